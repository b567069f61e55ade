"""Speed of one linear layer on the CPU: the package's kernels, torch's and other packages', against torch bfloat16.

    python benchmarks/kernels_cpu.py --out kernels_cpu.json
    python benchmarks/kernels_cpu.py --out kernels_cpu.json --threads 1 --rows 1,16,256 --shapes 2048x2048

Every contender holds copies of its weight that together exceed the cache by far (--rotate) and uses the next one at
each call. Each round calls every contender once, in random order, so that a busy machine slows all of them; a row
gives the least and the median time, the ratio of the least times to bfloat16's, and the median of the rounds'
ratios. With one thread what counts is its CPU time, which other work on the machine disturbs less. GB/s counts the
bytes of the weight only; its share is of the fastest plain read (a sum of 64 MiB) of the same rounds and threads.

``codes``: uint8 in, uint8 out, as between two layers of an integer graph. ``drop-in``: bfloat16 in, bfloat16 out, with
the quantization of the input, as in the place of one float layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from table import cpu_name
from torch import Tensor
from torch.nn import functional as F

from optimum_mobilequant.kernels import LinearSpec, Output, cpp, prepare
from optimum_mobilequant.kernels.registry import why_not
from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.run.prepare import versions

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (32000, 2048))  # out x in: TinyLlama's
ROWS = (1, 4, 16, 64, 256)
ACTIVATION = {"input_scale": 0.02, "input_zero_point": 128}
CODES = Output.codes(0.1, 128, Grid(8, signed=False))
REAL = Output.real(torch.bfloat16)
BASE, READ = "torch bfloat16", "read"
READ_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Args:
        weight_bytes: for each element of the weight, as stored.
        make: (out, in) -> a call with the input's bfloat16 values and codes, on one copy of the weight.
    """

    name: str
    weight_bytes: float
    make: Callable[[int, int], Callable[[Tensor, Tensor], Tensor]]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: give another --out")
    contenders, absent = find_contenders()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": args.threads,
        "instruction_set": None if cpp.available() else cpp.library().isa,
        "versions": versions(),
        "rotated_mib": args.rotate,
        "rounds": args.rounds,
        "absent": absent,
        "rows": [],
    }
    print(f"{record['cpu']}, {args.threads} threads")
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    for rows in args.rows:
        for shape in args.shapes:
            record["rows"] += measure(shape, rows, contenders, args)
            temporary = args.out.with_name(args.out.name + ".tmp")
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(args.out)
    print(table(record["rows"]))


def measure(
    shape: tuple[int, int], rows: int, contenders: Sequence[Contender], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender on one shape."""
    out, columns = shape
    calls = {}
    for contender in contenders:
        copies = max(2, -(-args.rotate * 2**20 // int(out * columns * contender.weight_bytes)))
        calls[contender.name] = cycle([contender.make(out, columns) for _ in range(copies)])
    memory = torch.ones(max(args.rotate * 2**20, READ_BYTES) // 4)
    x = torch.randn(rows, columns, dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    calls[READ] = cycle([lambda x, codes, part=part: part.sum() for part in memory.split(READ_BYTES // 4)])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    generator = random.Random(0)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    for turn in range(args.rounds + 2):
        for name in generator.sample(list(calls), len(calls)):
            call = next(calls[name])
            started = clock()
            call(x, codes)
            if turn >= 2:  # the first calls prepare code and threads
                seconds[name].append(clock() - started)
    base, bandwidth = seconds[BASE], READ_BYTES / min(seconds[READ]) / 1e9
    found = []
    for contender in contenders:
        own = seconds[contender.name]
        gb_per_s = out * columns * contender.weight_bytes / min(own) / 1e9
        found.append(
            {
                "out": out,
                "in": columns,
                "rows": rows,
                "contender": contender.name,
                "least_us": min(own) * 1e6,
                "median_us": statistics.median(own) * 1e6,
                "ratio_of_least": min(base) / min(own),
                "median_ratio": statistics.median(b / o for b, o in zip(base, own, strict=True)),
                "gb_per_s": gb_per_s,
                "share_of_memory": gb_per_s / bandwidth,
                "tera_operations_per_s": 2 * rows * out * columns / min(own) / 1e12,
            }
        )
    print(table(found), flush=True)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| rows | out x in | contender | least us | median us | x bf16 | x bf16, median | GB/s | of memory | TOPS |"
    lines = [head, "|" + "---|" * 10]
    for row in rows:
        cells = (
            f"{row['rows']}", f"{row['out']}x{row['in']}", row["contender"], f"{row['least_us']:.0f}",
            f"{row['median_us']:.0f}", f"{row['ratio_of_least']:.2f}", f"{row['median_ratio']:.2f}",
            f"{row['gb_per_s']:.1f}", f"{100 * row['share_of_memory']:.0f} %", f"{row['tera_operations_per_s']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_contenders() -> tuple[list[Contender], dict[str, str]]:
    """Those that run here, and why the others do not."""
    found = [Contender(BASE, 2, _plain(torch.bfloat16)), Contender("torch float32", 4, _plain(torch.float32))]
    absent: dict[str, str] = {}
    for backend, bits in (("cpp", 8), ("cpp", 4), ("onednn", 8), ("onednn", 4)):
        name = f"{backend} w{bits}a8"
        if reason := why_not(backend, LinearSpec(bits, 8, True, 64, 64, "cpu", CODES)):
            absent[name] = reason
            continue
        size = 0.5 if (backend, bits) == ("cpp", 4) else 1
        found.append(Contender(f"{name} codes", size, _ours(backend, bits, CODES)))
        if (backend, bits) != ("onednn", 4):
            found.append(Contender(f"{name} drop-in", size, _drop_in(backend, bits)))
    found += [Contender("quanto qint8", 1, _quanto(8)), Contender("quanto qint4", 0.5, _quanto(4))]
    if importlib.util.find_spec("torchao"):
        found.append(Contender("torchao int8 dynamic", 1, _torchao))
    else:
        absent["torchao"] = "not installed"
    return found, absent


def _plain(dtype: torch.dtype) -> Callable[[int, int], Callable[[Tensor, Tensor], Tensor]]:
    def make(out: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        weight = torch.randn(out, columns, dtype=dtype)
        return lambda x, codes: F.linear(x.to(dtype), weight)  # the cast is of rows alone, small beside the product

    return make


def _layer(backend: str, bits: int, output: Output, out: int, columns: int) -> Callable[[Tensor], Tensor]:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, columns), dtype=torch.int8)
    return prepare(codes, torch.full((out,), 1e-3), weight_bits=bits, output=output, backend=backend, **ACTIVATION)


def _ours(backend: str, bits: int, output: Output) -> Callable[[int, int], Callable[[Tensor, Tensor], Tensor]]:
    def make(out: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        layer = _layer(backend, bits, output, out, columns)
        return lambda x, codes: layer(codes)

    return make


def _drop_in(backend: str, bits: int) -> Callable[[int, int], Callable[[Tensor, Tensor], Tensor]]:
    scale, zero_point = ACTIVATION["input_scale"], ACTIVATION["input_zero_point"]
    quantizer = "cpp" if cpp.available() is None else "simulate"

    def make(out: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        layer = _layer(backend, bits, REAL, out, columns)
        quantize = torch.ops.mobilequant.quantize
        return lambda x, codes: layer(quantize(x, scale, zero_point, 8, quantizer))

    return make


def _quanto(bits: int) -> Callable[[int, int], Callable[[Tensor, Tensor], Tensor]]:
    def make(out: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        from optimum.quanto import freeze, qint4, qint8, quantize

        model = torch.nn.Sequential(torch.nn.Linear(columns, out, bias=False, dtype=torch.bfloat16))
        quantize(model, weights=qint8 if bits == 8 else qint4)
        freeze(model)

        def call(x: Tensor, codes: Tensor) -> Tensor:
            with torch.inference_mode():
                result: Tensor = model(x)
            return result

        return call

    return make


def _torchao(out: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(columns, out, bias=False, dtype=torch.bfloat16))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())

    def call(x: Tensor, codes: Tensor) -> Tensor:
        with torch.no_grad():  # torchao 0.18 fails in inference mode
            result: Tensor = model(x)
        return result

    return call


def _shape(text: str) -> tuple[int, int]:
    out, _, columns = text.partition("x")
    if not (out.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OUTxIN")
    return int(out), int(columns)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=lambda text: [int(m) for m in text.split(",")], default=list(ROWS))
    parser.add_argument("--shapes", type=lambda text: [_shape(s) for s in text.split(",")], default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=21, help="calls of each contender")
    parser.add_argument("--rotate", type=int, default=256, metavar="MIB", help="of copies of each contender's weight")
    parser.add_argument("--quick", action="store_true", help="one small shape: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.shapes, args.rounds, args.rotate = [1, 16], [(128, 256)], 2, 1
    return args


if __name__ == "__main__":
    main()
