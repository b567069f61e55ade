"""Quantize the embedded model to W8A8 and W4A8, compare recipes, reload the result in a fresh process, write a sample.

    python examples/demo.py --out demo-out

No network is used: the model lies beside this file, calibration and held-out text are the standard library of the
running Python. Leaves the two MobileQuant checkpoints, ``demo.json`` and ``report.html`` in the output folder.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a hub request would be a fault

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_mobilequant import MobileQuantConfig, perplexity, quantize
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.report import collect_report, to_html

MODEL = Path(__file__).resolve().parent / "demo_model"
PRESETS = ("w8a8", "w4a8")
RECIPES = ("rtn", "smoothquant-edge", "mobilequant")
HELD_OUT_CHARACTERS = 100_000
PROMPT = "    def __init__(self, name, value=None):\n"
REPORTED = "w4a8"  # the checkpoint that the report is about
RECORD = ".demo-files.json"  # what the demo wrote, so that a second run replaces this and nothing else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for checkpoints and demo.json")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a float model")
    parser.add_argument("--effort", default="default", help="none, light, default or best")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", nargs=2, metavar=("CHECKPOINT", "LOGITS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        check_reloaded(*args.check)
        return
    started = time.monotonic()
    if not (args.model / "config.json").is_file():
        raise SystemExit(f"no model in {args.model}: give --model a folder that save_pretrained wrote")
    out = Output(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        rows, reloaded = ladder(args, out, Path(scratch))
        result = {
            "rows": rows,
            "sample": reloaded[REPORTED]["sample"],
            "reload_bitwise": all(found["bitwise"] for found in reloaded.values()),
            "seconds": time.monotonic() - started,
        }
        out.write("demo.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        out.write("report.html", page(out.path, Path(scratch) / REPORTED))
    show(result, out.path)


def ladder(
    args: argparse.Namespace, out: Output, scratch: Path
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every recipe at every preset: the rows, and what a fresh process found in the MobileQuant checkpoints."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = held_out()
    probe = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][:, :128]
    rows: list[dict[str, Any]] = []
    reloaded: dict[str, dict[str, Any]] = {}

    def add(model: PreTrainedModel, preset: str, recipe: str, minutes: float, estimate: float = 0.0) -> None:
        value = perplexity(model, tokenizer, text, progress=False).perplexity
        row = {"perplexity": value, "gap": value / rows[0]["perplexity"] - 1 if rows else 0.0}
        row |= {"bytes": saved_bytes(model, scratch), "minutes": minutes}
        row |= {"minutes_estimate": estimate}
        rows.append({"model": args.model.name, "preset": preset, "recipe": recipe} | row)

    add(load(args.model), "float32", "float", 0.0)
    for preset, recipe in product(PRESETS, RECIPES):
        print(f"{preset} {recipe}", flush=True)
        config = MobileQuantConfig(preset, recipe=recipe, effort=args.effort, dataset="python-stdlib", seed=args.seed)
        begun = time.monotonic()
        kept = str(scratch / preset) if recipe == "mobilequant" else None  # its stages are part of the report
        model = quantize(load(args.model), tokenizer, config, run_dir=kept)
        estimate = model.config.quantization_config.recorded["minutes_estimate"]
        add(model, preset, recipe, (time.monotonic() - begun) / 60, estimate)
        if recipe == "mobilequant":
            out.save(preset, model, tokenizer)
            with torch.no_grad():
                save_file({"ids": probe, "logits": model(probe).logits}, scratch / "probe.safetensors")
            reloaded[preset] = in_fresh_process(out.path / preset, scratch / "probe.safetensors")
    return rows, reloaded


def held_out() -> str:
    return "\n".join(stdlib_texts("test"))[:HELD_OUT_CHARACTERS]


def page(out: Path, run_dir: Path) -> str:
    """The report of a checkpoint, with every activation measured on the held-out text."""
    print(f"report of {REPORTED}", flush=True)
    words = ["mobilequant", "report", str(out / REPORTED), "--ladder", str(out / "demo.json"), "--text", "FILE"]
    found = collect_report(
        out / REPORTED, run_dir=run_dir, ladder=out / "demo.json", text=held_out(), command=shlex.join(words)
    )
    return to_html(found)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def saved_bytes(model: PreTrainedModel, scratch: Path) -> int:
    """Size of the weight files this model is saved as."""
    folder = scratch / "size"
    model.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shutil.rmtree(folder)
    return size


# Reloading -----------------------------------------------------------------------------------------------------------


def in_fresh_process(checkpoint: Path, logits: Path) -> dict[str, Any]:
    """What a new interpreter finds in the checkpoint: logits bit for bit as saved, and a sample of its text."""
    command = [sys.executable, __file__, "--check", str(checkpoint), str(logits)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how they are split
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"reloading {checkpoint} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def check_reloaded(checkpoint: str, logits: str) -> None:
    """Body of the fresh process: ``import optimum_mobilequant`` above is all that loading takes."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    saved = load_file(logits)
    bitwise = torch.equal(model(saved["ids"]).logits, saved["logits"])
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(
        **prompt, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=20, pad_token_id=tokenizer.eos_token_id
    )
    print(json.dumps({"bitwise": bitwise, "sample": tokenizer.decode(tokens[0], skip_special_tokens=True)}))


# Output --------------------------------------------------------------------------------------------------------------


class Output:
    """The output folder. Files that were not written by the demo stay; if one is in the way, nothing is started."""

    def __init__(self, path: Path):
        self.path = path
        record = path / RECORD
        self.files: list[str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
        mine = {path / file for file in self.files}
        for target in (path / "demo.json", path / "report.html", *(path / preset for preset in PRESETS)):
            for found in [target, *target.rglob("*")]:
                if found.exists() and not found.is_dir() and found not in mine:
                    raise SystemExit(f"{found} was not written by the demo: move it, or give another --out")
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str) -> None:
        self._claim([name])
        (self.path / name).write_text(text, encoding="utf-8")

    def save(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Replace the checkpoint ``name``, once the new one is complete."""
        with tempfile.TemporaryDirectory(dir=self.path) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            files = sorted(path.name for path in Path(scratch).iterdir())
            for old in [file for file in self.files if file.startswith(f"{name}/")]:
                (self.path / old).unlink(missing_ok=True)
            self._claim([f"{name}/{file}" for file in files])
            (self.path / name).mkdir(exist_ok=True)
            for file in files:
                shutil.move(Path(scratch) / file, self.path / name / file)

    def _claim(self, names: list[str]) -> None:
        self.files = sorted({*self.files, *names})
        (self.path / RECORD).write_text(json.dumps(self.files), encoding="utf-8")


def show(result: dict[str, Any], out: Path) -> None:
    print(f"\n{'preset':<10}{'recipe':<20}{'perplexity':>12}{'gap':>10}{'bytes':>14}{'minutes':>10}")
    for row in result["rows"]:
        numbers = f"{row['perplexity']:>12.3f}{row['gap']:>10.2%}{row['bytes']:>14,}{row['minutes']:>10.2f}"
        print(f"{row['preset']:<10}{row['recipe']:<20}{numbers}")
    print(f"\nreloaded in a fresh process: logits {'equal bit for bit' if result['reload_bitwise'] else 'DIFFER'}")
    print(f"a sample of the reloaded {REPORTED} checkpoint:\n\n{result['sample']}\n")
    command = Path(sys.executable).with_name("mobilequant")
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    best = {row["preset"]: row for row in result["rows"] if row["recipe"] == "mobilequant"}
    print(f"done in {result['seconds']:.0f} seconds; in {out}/ are")
    for preset, row in best.items():
        what = f"the checkpoint: {row['bytes'] / 1e6:.1f} MB of weights, {row['gap']:+.2%} perplexity against float"
        print(f"  {preset + '/':<14}{what}")
    print(f"  {'report.html':<14}the story of {REPORTED} on one page: open it in a browser")
    print(f"  {'demo.json':<14}the numbers above")
    print("try next:")
    for words in (
        f"inspect {out / REPORTED}",
        f"export {out / REPORTED} --to onnx --out {out / 'onnx'} --context 64 --prompt-length 16",
        f"quantize YOUR_MODEL --preset {REPORTED} --dataset YOUR_TEXT.txt --out my-model",
    ):
        print(f"  {command} {words}")


if __name__ == "__main__":
    main()
