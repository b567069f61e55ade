"""Speed of whole decoder layers on the CPU, backend by backend, beside transformers in float32 and bfloat16.

    python benchmarks/cpu_layers.py --layers 2 --threads 1 --out cpu_layers.json

A model of TinyLlama's shape with random weights for each contender, all in one process, in turns and in random order.
With one thread what counts is the CPU time of the calling thread, which other work on the machine disturbs little;
with more it is the time that passes. ``single``: the same backend with its linears one by one, as where layers cannot
be fused. bfloat16 runs in the last repetition alone: it takes minutes where the processor has no instructions for it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_model import random_float, random_quantized
from speed import SHAPES
from table import cpu_name

from optimum_mobilequant.bench.runners import TransformersRunner
from optimum_mobilequant.kernels import cpp
from optimum_mobilequant.kernels.registry import unavailable
from optimum_mobilequant.run.prepare import versions
from optimum_mobilequant.runtime import backend, served

_CONDITIONS = ("shape", "preset", "layers", "prompt", "tokens", "repeat", "threads")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DROPPED = 2  # tokens after a prompt that do not count


def contenders(args: argparse.Namespace) -> dict[str, TransformersRunner]:
    """The models, those that can run here."""
    config, found = SHAPES[args.shape](args.layers), {}
    for name in ("cpp", "onednn"):
        if unavailable(name):
            continue
        for fused, called in ((True, name), (False, f"{name} single")):
            with mock.patch.object(backend, "FUSED", backend.FUSED if fused else ()):
                model = random_quantized(config, args.preset, backend=name)
                model(torch.zeros(1, 2, dtype=torch.long))  # packs
            print(f"{called}: {served(model)[0].operator} by {served(model)[0].backend}")
            found[called] = TransformersRunner(model)
    for name, dtype in FLOATS.items():
        found[name] = TransformersRunner(random_float(config, dtype=dtype))
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each repetition: contender -> prefill and decode."""
    clock: Callable[[], float] = time.thread_time if args.threads == 1 else time.perf_counter
    runners = contenders(args)
    speeds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in runners}
    for turn in range(args.repeat + 1):
        ids = torch.randint(SHAPES[args.shape](1).vocab_size, (args.prompt,))
        names = [name for name in runners if name != "bf16" or turn == args.repeat]
        for name in random.sample(names, len(names)):
            started = clock()
            token = runners[name].read(ids)
            prefill = args.prompt / (clock() - started)
            for step in range(args.tokens):
                if step == _DROPPED:
                    started = clock()
                token = runners[name].write(token)
            if turn:
                speeds[name]["prefill"].append(prefill)
                speeds[name]["decode"].append((args.tokens - _DROPPED) / (clock() - started))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tinyllama")
    parser.add_argument("--preset", default="w4a8")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=14)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speeds = measure(args)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "instruction_set": None if cpp.available() else cpp.library().isa,
        "versions": versions(),
        **{name: getattr(args, name) for name in _CONDITIONS},
        "tokens_per_s": {n: {phase: statistics.median(v) for phase, v in s.items()} for n, s in speeds.items()},
        "vs_fp32": {
            n: {p: statistics.median(a / b for a, b in zip(v[::-1], speeds["fp32"][p][::-1], strict=False))
                for p, v in s.items()}
            for n, s in speeds.items()
        },
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
