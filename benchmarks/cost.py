"""Time and memory of tuning, as multiples of plain float training on the same batch.

    python benchmarks/cost.py --out cost.json

Time: A is one float forward and backward pass (cross-entropy, transformers' default attention, no optimizer); B is one
tuning step (the float teacher's targets, forward and backward of the quantized student, optimizer). They alternate,
A B A B ..., so that a busy machine slows both; the medians count. Memory: each is run alone in a fresh process, which
reports how far its peak resident size rose above what it was before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import EMBEDDED
from table import cpu_name
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.calibrate.stage import calibrate
from optimum_mobilequant.run.prepare import prepare, versions
from optimum_mobilequant.run.resources import peak_memory
from optimum_mobilequant.transform.stage import transform
from optimum_mobilequant.tune import build_student, learn_end_to_end
from optimum_mobilequant.tune.stage import objective_of


def load(args: argparse.Namespace) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def config_of(args: argparse.Namespace) -> MobileQuantConfig:
    sizes = {"samples": args.batch, "seq_len": args.length, "batch_size": args.batch}
    return MobileQuantConfig(
        args.preset, dataset="python-stdlib", bos=False, recipe="mobilequant", steps=args.rounds, **sizes
    )


def float_step(model: PreTrainedModel) -> Callable[[torch.Tensor], None]:
    """Forward and backward over all weights."""

    def step(ids: torch.Tensor) -> None:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step


def compare_time(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of both steps and their ratio.

    The tuning steps are those of the library's own loop. It asks for the loss once a step, and that is where the float
    step is slipped in: a tuning step lasts from the end of one float step to the beginning of the next.
    """
    float_seconds: list[float] = []
    tuning_seconds: list[float] = []
    resumed: float | None = None
    with prepare(load(args), AutoTokenizer.from_pretrained(args.model), config_of(args), None) as job:
        float_pass = float_step(load(args))
        student = build_student(job.model, job.plan, checkpointing=bool(job.settings.gradient_checkpointing))
        learnables = transform(job.model, student, calibrate(student, job), job)
        objective = objective_of(job, args.warmup + args.rounds + 1)

        def loss_of(ids: torch.Tensor) -> torch.Tensor:
            nonlocal resumed
            if torch.is_grad_enabled():  # else it is validating
                entered = time.perf_counter()
                if resumed is not None:
                    tuning_seconds.append(entered - resumed)
                float_pass(ids)
                resumed = time.perf_counter()
                float_seconds.append(resumed - entered)
            return objective(student, job.model, ids)

        steps = args.warmup + args.rounds + 1
        sizes = {"steps": steps, "batch_size": args.batch, "eval_every": steps, "seed": 0}
        learn_end_to_end(learnables, student, loss_of, job.data.train, job.data.validation, rates=job.rates, **sizes)
    pairs = list(zip(float_seconds, tuning_seconds, strict=False))[args.warmup :]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return {
        "float_seconds": medians[0],
        "tuning_seconds": medians[1],
        "ratio": medians[1] / medians[0],
        "ratio_of_pairs_lowest": min(b / a for a, b in pairs),
        "ratio_of_pairs_highest": max(b / a for a, b in pairs),
    }


def measure_memory(args: argparse.Namespace) -> int:
    """Peak of the one thing ``args.memory_of`` names, above the peak before the model is loaded."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = torch.randint(5, len(tokenizer), (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    before = peak_memory()
    model = load(args)
    if args.memory_of == "float forward":
        with torch.no_grad():
            for _ in range(args.rounds):
                model(input_ids=data, use_cache=False)
    elif args.memory_of == "float forward and backward":
        step = float_step(model)
        for _ in range(args.rounds):
            step(data)
    else:
        quantize(model, tokenizer, config_of(args))
    return peak_memory() - before


MEASURED = ("float forward", "float forward and backward", "quantize")


def compare_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak bytes of each, by fresh processes, and the ratio of a whole run to float training without optimizer."""
    peaks: dict[str, float] = {}
    for name in MEASURED:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"measuring {name!r} failed:\n{done.stderr}")
        peaks[f"{name} bytes"] = int(done.stdout.splitlines()[-1])
    model = load(args)
    peaks["float weights bytes"] = sum(p.nbytes for p in model.parameters())
    peaks["ratio"] = peaks["quantize bytes"] / peaks["float forward and backward bytes"]
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED), help="folder of a float model")
    parser.add_argument("--preset", default="w4a8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    parser.add_argument("--memory-of", choices=MEASURED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args))
        return
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "preset": args.preset,
        "batch": [args.batch, args.length],
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "time": compare_time(args),
        "memory": compare_memory(args),
    }
    for part in ("time", "memory"):
        for name, value in result[part].items():
            shown = f"{value / 2**20:.1f} MiB" if name.endswith("bytes") else f"{value:.3f}"
            print(f"{part}  {name.removesuffix(' bytes').replace('_', ' '):<30}{shown}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
