"""Speed of one linear layer on an NVIDIA GPU: the package's kernels against torch bfloat16, quanto and torchao.

    python benchmarks/kernels_gpu.py --out benchmarks/results/kernels_gpu.json
    python benchmarks/kernels_gpu.py --out k.json --rows 1,16 --shapes 4096x4096 --tune

Every contender holds copies of its weight that together exceed the L2 cache by far (--rotate) and uses the next one at
each call. Calls are captured in CUDA graphs, one for each contender, of as many calls as there are copies; each round
replays every graph once, in random order, and a row gives the least and the median time of a call and their ratios to
bfloat16's. Where a contender cannot be captured, its row says so and its calls are timed one by one. GB/s counts the
bytes of the weight only, and its share is of a copy of 256 MiB in the same rounds (read and written bytes). ``codes``:
uint8 in, uint8 out; ``real``: uint8 in, bfloat16 out; W4A16: bfloat16 in and out. The last shapes are a 1 B model's:
at one row the launches weigh more there than the bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_mobilequant.kernels import BACKENDS, Output, prepare
from optimum_mobilequant.kernels.gpu import autotune, linear
from optimum_mobilequant.kernels.weight_only import prepare_weight_only
from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.run.prepare import versions

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (2048, 2048), (5632, 2048), (2048, 5632))  # out x in
ROWS = (1, 4, 8, 16, 2048)
ACTIVATION = {"input_scale": 0.02, "input_zero_point": 128}
CODES = Output.codes(0.1, 128, Grid(8, signed=False))
REAL = Output.real(torch.bfloat16)
BASE, COPY = "torch bfloat16", "copy"
COPY_BYTES = 256 * 2**20
Run = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Args:
        weight_bytes: for each element of the weight, as stored, scales of groups included.
        make: (out, in) -> a call with the input's bfloat16 values and codes, on one copy of the weight.
    """

    name: str
    weight_bytes: float
    make: Callable[[int, int], Run]


def main() -> None:
    args = parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: give another --out")
    if reason := BACKENDS["triton"].available():
        raise SystemExit(f"this benchmark needs a CUDA GPU of compute capability 8.0 or newer: {reason}")
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU: Triton's interpreter has no speed to measure")
    contenders, absent = find_contenders()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": list(torch.cuda.get_device_capability()),
        "versions": {**versions(), "triton": triton_version(), "cuda": torch.version.cuda},
        "rotated_mib": args.rotate,
        "rounds": args.rounds,
        "tuned": args.tune,
        "absent": absent,
        "rows": [],
    }
    print(record["gpu"])
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    for rows in args.rows:
        for shape in args.shapes:
            if args.tune:
                tune(shape, rows)
            record["rows"] += measure(shape, rows, contenders, args)
            temporary = args.out.with_name(args.out.name + ".tmp")
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(args.out)
    print(table(record["rows"]))


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def tune(shape: tuple[int, int], rows: int) -> None:
    """Measure configurations of the integer kernels and keep the best (in the user's cache)."""
    out, columns = shape
    x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda")
    for bits in (8, 4):
        packed = _layer(bits, CODES, out, columns).packed
        call = autotune.measured(lambda config, p=packed, b=bits: linear.linear(x, p, CODES, b, config=config))
        autotune.tune(f"w{bits}a8", out, columns, rows, x.device, call)


def measure(
    shape: tuple[int, int], rows: int, contenders: Sequence[Contender], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender on one shape."""
    out, columns = shape
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda")
    replays: dict[str, tuple[Callable[[], Any], int, bool]] = {}
    for contender in contenders:
        copies = max(2, -(-args.rotate * 2**20 // int(out * columns * contender.weight_bytes)))
        runs = [contender.make(out, columns) for _ in range(copies)]
        replay, captured = capture(runs, x, codes)
        replays[contender.name] = (replay, copies, captured)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    replays[COPY] = (lambda: target.copy_(source), 1, False)
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    generator = random.Random(0)
    for turn in range(args.rounds + 2):
        for name in generator.sample(list(replays), len(replays)):
            replay, calls, _ = replays[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first calls warm up
                seconds[name].append(start.elapsed_time(end) / 1e3 / calls)
    base, bandwidth = seconds[BASE], 2 * COPY_BYTES / min(seconds[COPY]) / 1e9
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
                "cuda_graph": replays[contender.name][2],
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


def capture(runs: Sequence[Run], x: Tensor, codes: Tensor) -> tuple[Callable[[], Any], bool]:
    """All calls as one CUDA graph, or, where a contender cannot be captured, as they are."""

    def all_calls() -> None:
        for run in runs:
            run(x, codes)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_calls()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_calls()
    except RuntimeError as error:
        print(f"not captured in a CUDA graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return all_calls, False
    return graph.replay, True


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| rows | out x in | contender | least us | median us | x bf16 | x bf16, median | GB/s | of memory | TOPS |"
    lines = [head, "|" + "---|" * 10]
    for row in rows:
        cells = (
            f"{row['rows']}", f"{row['out']}x{row['in']}",
            row["contender"] + ("" if row["cuda_graph"] else " (no graph)"), f"{row['least_us']:.1f}",
            f"{row['median_us']:.1f}", f"{row['ratio_of_least']:.2f}", f"{row['median_ratio']:.2f}",
            f"{row['gb_per_s']:.0f}", f"{100 * row['share_of_memory']:.0f} %",
            f"{row['tera_operations_per_s']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_contenders() -> tuple[list[Contender], dict[str, str]]:
    """Those that run here, and why the others do not."""
    found, absent = [Contender(BASE, 2, _bfloat16)], {}
    for bits in (8, 4):
        found += [
            Contender(f"triton w{bits}a8 {name}", bits / 8, _ours(bits, output))
            for name, output in (("codes", CODES), ("real", REAL))
        ]
    found += [
        Contender("triton w4a16", 0.5, _weight_only(0, "int4")),
        Contender("triton w4a16 g128", 0.5 + 4 / 128, _weight_only(128, "int4")),
        Contender("triton w4a16 g128 e0m4", 0.5 + 8 / 128, _weight_only(128, "e0m4")),
    ]
    for name, bits in (("quanto qint8", 8), ("quanto qint4", 4)):
        try:
            _quanto(bits)(256, 256)(torch.ones(1, 256, dtype=torch.bfloat16, device="cuda"), torch.empty(0))
            found.append(Contender(name, bits / 8, _quanto(bits)))
        except Exception as error:  # its extensions are compiled on first use, and fail in many ways
            absent[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    if importlib.util.find_spec("torchao"):
        found.append(Contender("torchao int8 dynamic", 1, _torchao))
    else:
        absent["torchao"] = "not installed"
    return found, absent


def _bfloat16(out: int, columns: int) -> Run:
    weight = torch.randn(out, columns, dtype=torch.bfloat16, device="cuda")
    return lambda x, codes: F.linear(x, weight)


def _random_codes(bits: int, out: int, columns: int) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, columns), dtype=torch.int8, device="cuda")


def _layer(bits: int, output: Output, out: int, columns: int) -> Any:
    scale = torch.full((out,), 1e-3, device="cuda")
    codes = _random_codes(bits, out, columns)
    return prepare(codes, scale, weight_bits=bits, output=output, backend="triton", **ACTIVATION)


def _ours(bits: int, output: Output) -> Callable[[int, int], Run]:
    def make(out: int, columns: int) -> Run:
        layer = _layer(bits, output, out, columns)
        return lambda x, codes: layer(codes)

    return make


def _weight_only(group: int, decode: str) -> Callable[[int, int], Run]:
    def make(out: int, columns: int) -> Run:
        scale = torch.full((out, -(-columns // group) if group else 1), 1e-3, device="cuda")
        codes = _random_codes(4, out, columns)
        layer = prepare_weight_only(codes, scale, group=group, decode=decode, backend="triton")
        return lambda x, codes: layer(x)

    return make


def _quanto(bits: int) -> Callable[[int, int], Run]:
    def make(out: int, columns: int) -> Run:
        from optimum.quanto import freeze, qint4, qint8, quantize

        model = torch.nn.Sequential(torch.nn.Linear(columns, out, bias=False, dtype=torch.bfloat16, device="cuda"))
        quantize(model, weights=qint8 if bits == 8 else qint4)
        freeze(model)
        return _inference(model)

    return make


def _torchao(out: int, columns: int) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(columns, out, bias=False, dtype=torch.bfloat16, device="cuda"))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _inference(model)


def _inference(model: torch.nn.Module) -> Run:
    def call(x: Tensor, codes: Tensor) -> Any:
        with torch.inference_mode():
            return model(x)

    return call


def _shape(text: str) -> tuple[int, int]:
    out, _, columns = text.partition("x")
    if not (out.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OUTxIN")
    return int(out), int(columns)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the rows")
    parser.add_argument("--rows", type=lambda text: [int(m) for m in text.split(",")], default=list(ROWS))
    parser.add_argument("--shapes", type=lambda text: [_shape(s) for s in text.split(",")], default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=21, help="replays of each contender")
    parser.add_argument("--rotate", type=int, default=512, metavar="MIB", help="of copies of each contender's weight")
    parser.add_argument("--tune", action="store_true", help="measure configurations first, and keep the best ones")
    return parser.parse_args()


if __name__ == "__main__":
    main()
