"""Peak memory of quantizing, for settings that change it, beside the estimate that a run logs.

    python benchmarks/memory.py --out memory.json

Each row is one run in a fresh process on a Llama with random weights (memory depends on the shape alone). ``peak`` is
how far the peak resident size rose above what it was before the model was made; ``estimate`` is what the run logged
before it started. Rows differ from the first in the settings they name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from random_model import random_float
from table import Table
from transformers import LlamaConfig
from transformers.utils import logging

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.run.resources import peak_memory

BASE = {"preset": "w4a8", "recipe": "mobilequant", "batch_size": 8, "seq_len": 256, "gradient_checkpointing": False}
ROWS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gradient_checkpointing=True": {"gradient_checkpointing": True},
    "batch_size=4": {"batch_size": 4},
    "batch_size=1": {"batch_size": 1},
    "seq_len=128": {"seq_len": 128},
    "gradient_checkpointing=True, batch_size=1": {"gradient_checkpointing": True, "batch_size": 1},
    "teacher_dtype=bfloat16": {"teacher_dtype": "bfloat16"},
    # Random weights learn nothing, and a stage that ends above its start is refused: it moves by next to nothing.
    "tuning=block-wise": {"tuning": "block-wise", "lr_transforms": 1e-8, "lr_clips": 1e-8, "lr_ranges": 1e-8},
    "recipe=best": {"recipe": "best"},
    "recipe=gptq": {"recipe": "gptq"},
    "recipe=rtn": {"recipe": "rtn"},
}
HEADER = ("settings", "estimate MiB", "peak MiB", "of the first")


def shape(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=8 * args.hidden // 3 // 32 * 32,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip


def measure(name: str, args: argparse.Namespace) -> dict[str, int]:
    """One run in this process."""
    options = BASE | ROWS[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (args.samples + 4, 256), generator=generator).tolist()
    if options.get("recipe") not in ("rtn", "gptq"):
        options |= {"steps": args.steps}
    if options.get("recipe") == "best":
        options |= {"rounding_steps": args.steps, "prefix": False}
    config = MobileQuantConfig(dataset=ids, samples=args.samples, bos=False, backend="simulate", **options)
    before = peak_memory()
    torch.manual_seed(0)
    model = quantize(random_float(shape(args), dtype=torch.float32), None, config)
    recorded = model.config.quantization_config.recorded
    return {"estimate": recorded["memory_estimate_bytes"], "peak": peak_memory() - before}


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.row:
        print(json.dumps(measure(args.row, args)))
        return
    sizes = ("layers", "hidden", "vocabulary", "samples", "steps")
    settings = BASE | {name: getattr(args, name) for name in sizes}
    weights = sum(p.numel() for p in random_float(shape(args), dtype=torch.float32).parameters())
    table = Table(
        args.out,
        settings | {"parameters": weights},
        append=args.append,
        keys=("settings",),
        header=HEADER,
        cells=cells,
    )
    for name in args.only or ROWS:
        if not table.has(name):
            command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            first = table.rows[0]["peak"] if table.rows else None
            values = json.loads(done.stdout.splitlines()[-1])
            table.add(name, values=values | {"ratio": values["peak"] / (first or values["peak"])})
    print(table.markdown())


def cells(row: dict[str, Any]) -> list[str]:
    return [row["settings"], f"{row['estimate'] / 2**20:.0f}", f"{row['peak'] / 2**20:.0f}", f"{row['ratio']:.2f}"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the rows")
    parser.add_argument("--append", action="store_true", help="continue that file: measure what it lacks")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="SETTINGS", help="rows to measure")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="of every kind of tuning in the row")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
