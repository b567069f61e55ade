"""Perplexity of a quantized model by every backend that runs here, against the simulation's, on one text.

    python benchmarks/backends.py --out backends.json

The demo model (or ``--model``) is quantized in memory, without training unless ``--recipe`` says so.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from quality import EMBEDDED
from table import cpu_name, markdown
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_mobilequant import MobileQuantConfig, perplexity, quantize, set_backend
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.kernels import registry
from optimum_mobilequant.run.prepare import versions
from optimum_mobilequant.runtime import served

BACKENDS = ("simulate", "cpp", "onednn")


def measure(args: argparse.Namespace, preset: str) -> list[dict[str, Any]]:
    """A row for each backend."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    sizes = {"samples": args.samples, "seq_len": args.length}
    config = MobileQuantConfig(preset, recipe=args.recipe, dataset="python-stdlib", bos=False, **sizes)
    quantize(model, tokenizer, config)
    text = "\n".join(stdlib_texts("test"))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[: args.tokens]
    rows: list[dict[str, Any]] = []
    for name in BACKENDS:
        if name != "simulate" and registry.unavailable(name):
            continue
        set_backend(model, name)
        if (used := {layer.backend for layer in served(model)}) - {name}:
            raise SystemExit(f"{preset}: layers run with {used}, not with {name}")
        found = perplexity(model, None, ids, seq_len=args.length)
        first = rows[0]["perplexity"] if rows else found.perplexity
        rows.append(
            {
                "preset": preset,
                "backend": name,
                "perplexity": found.perplexity,
                "difference": found.perplexity / first - 1,
                "tokens": found.tokens,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED), help="folder of a float model")
    parser.add_argument("--presets", default="w8a8,w4a8", metavar="NAMES", help="separated by commas")
    parser.add_argument("--recipe", default="rtn")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    rows = [row for preset in args.presets.split(",") for row in measure(args, preset)]
    cells = ([r["preset"], r["backend"], f"{r['perplexity']:.4f}", f"{r['difference']:+.4%}"] for r in rows)
    print(markdown(("preset", "backend", "perplexity", "against the simulation"), cells))
    if args.out is not None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": cpu_name(),
            "versions": versions(), "model": Path(args.model).name, "recipe": args.recipe,
        }  # fmt: skip
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
