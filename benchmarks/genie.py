"""Qualcomm's libGenie on a bundle of a checkpoint, against the simulation of the same checkpoint.

    python benchmarks/genie.py CHECKPOINT --out genie.json

Exports the checkpoint to Genie (context binaries for the HTP emulator), gives each of some prompts of --prompt-tokens
tokens, longer than a chunk, and asks for --tokens greedy tokens. ``per step`` is the share of Genie's tokens that the
simulation finds most likely after Genie's own text so far; ``whole texts`` counts the prompts whose free-running texts
are equal. One flip of two nearly equal logits changes all that follows, so the first is the measure.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from table import cpu_name
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import export
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.exporters.genie_runner import generate
from optimum_mobilequant.run.prepare import versions


@dataclass(frozen=True)
class Row:
    """One prompt: equal tokens of all, whether the texts are equal, logit gaps where they differ."""

    equal: int
    tokens: int
    same_text: bool
    gaps: list[float]


def main() -> None:
    args = parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    texts = [args.text.read_text(encoding="utf-8")] if args.text else stdlib_texts("test")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"context": args.context, "prompt_length": args.chunk, "soc": args.soc}
        bundle = export(args.checkpoint, "genie", Path(folder) / "bundle", **sizes).path
        first = json.loads((bundle / "genie_config.json").read_text(encoding="utf-8"))["dialog"]["context"][
            "bos-token"
        ]
        bos = [first] if first >= 0 else []
        for ids in prompts(tokenizer, texts, args.prompt_tokens, args.prompts):
            rows.append(compare(model, bundle, bos, ids, args.tokens))
            print(f"{rows[-1].equal}/{rows[-1].tokens} tokens, same text: {rows[-1].same_text}", flush=True)
    equal, tokens = sum(row.equal for row in rows), sum(row.tokens for row in rows)
    gaps = sorted(gap for row in rows for gap in row.gaps)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "versions": versions() | {"onnxruntime-qnn": version("onnxruntime-qnn")},
        "checkpoint": args.checkpoint.resolve().name,
        "preset": model.config.quantization_config.preset,
        "settings": {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens, **sizes},
        "per_step": equal / tokens,
        "whole_texts": sum(row.same_text for row in rows),
        "prompts": len(rows),
        "largest_gap": gaps[-1] if gaps else 0.0,
        "rows": [asdict(row) for row in rows],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("| checkpoint | preset | tokens | per step | whole texts | largest logit gap where they differ |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {result['checkpoint']} | {result['preset']} | {tokens} | {100 * equal / tokens:.1f} % | "
        f"{result['whole_texts']} of {len(rows)} | {result['largest_gap']:.2f} |"
    )


def prompts(tokenizer, texts: list[str], length: int, count: int) -> list[list[int]]:
    """The first ``length`` tokens of ``count`` texts, or of as many stretches of a single one."""
    if len(texts) == 1:
        ids = tokenizer(texts[0], add_special_tokens=False, verbose=False)["input_ids"]
        found = [list(part) for part in torch.tensor(ids[: len(ids) // length * length]).view(-1, length).tolist()]
    else:
        every = tokenizer([text[:4000] for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        found = [ids[:length] for ids in every if len(ids) >= length]
    if len(found) < count:
        raise SystemExit(f"the text gives {len(found)} prompts of {length} tokens, not {count}: lower --prompts")
    return found[:: len(found) // count][:count]


@torch.no_grad()
def compare(model, bundle: Path, bos: list[int], ids: list[int], tokens: int) -> Row:
    made = generate(bundle, ids, tokens=tokens).ids
    prompt = torch.tensor([bos + ids])
    logits = model(input_ids=torch.tensor([bos + ids + made])).logits[0, prompt.shape[1] - 1 : -1]
    free = model.generate(prompt, max_new_tokens=len(made), min_new_tokens=len(made), do_sample=False)
    chosen = logits.argmax(-1).tolist()
    wrong = [i for i, (ours, theirs) in enumerate(zip(chosen, made, strict=True)) if ours != theirs]
    gaps = [float(logits[i].max() - logits[i, made[i]]) for i in wrong]
    return Row(len(made) - len(wrong), len(made), free[0, prompt.shape[1] :].tolist() == made, gaps)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder written by quantize")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text of the prompts (the standard library's)")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32, help="tokens of the prompt graph")
    parser.add_argument("--soc", default="sm8650")
    args = parser.parse_args()
    if not args.chunk < args.prompt_tokens < args.context - args.tokens:
        parser.error("needs --chunk < --prompt-tokens < --context - --tokens")
    return args


if __name__ == "__main__":
    main()
