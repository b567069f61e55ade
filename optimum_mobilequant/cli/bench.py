"""``mobilequant bench``."""

from __future__ import annotations

import argparse
from typing import Any

from .common import AddCommand, check_model, positive, print_json


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("bench", "Time a quantized checkpoint on this CPU, beside other ways to run the same model.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a quantized model")
    parser.add_argument(
        "--against", default="bf16", metavar="NAMES", help="peers, separated by commas: bf16 (the default), "
        "fp32, bf16-compile, quanto, torchao, torchao-int8, torchao-int4, onnxruntime, onnxruntime-int4",
    )  # fmt: skip
    parser.add_argument("--prompt", type=positive, default=256, metavar="N", help="tokens that are read (256)")
    parser.add_argument("--tokens", type=positive, default=32, metavar="N", help="tokens that are written (32)")
    parser.add_argument("--repeat", type=positive, default=5, metavar="N", help="repetitions (5)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (torch's default)")
    parser.add_argument("--apart", action="store_true", help="one peer at a time: at most two models in memory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_command(args: argparse.Namespace) -> int:
    from optimum_mobilequant.bench import check_installed, compare_speed

    names = [name for name in args.against.split(",") if name]
    check_installed(names)
    sizes = {name: getattr(args, name) for name in ("prompt", "tokens", "repeat", "threads")}
    found = compare_speed(check_model(args.checkpoint), names, **sizes, apart=args.apart)
    if args.json:
        print_json(found)
    else:
        print(table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """A row for each contender; in brackets how many times that of the peer the checkpoint's is."""
    lines = [
        f"{found['threads']} threads, {found['prompt']} tokens read, {found['tokens']} written, median of "
        f"{found['repeat']}, by turns; in brackets: {next(iter(found['contenders']))} over the peer",
        f"{'':<18}{'read tokens/s':>20}{'write tokens/s':>20}{'weights MiB':>20}{'peak MiB':>20}",
    ]
    for name, row in found["contenders"].items():
        ratio = found["ratios"].get(name, {})

        def cell(value: float | None, key: str, ratio: dict[str, float] = ratio) -> str:
            shown = "-" if value is None else f"{value:.1f}"
            return f"{shown} ({ratio[key]:.2f}x)" if key in ratio else shown

        peak = row["peak_bytes"]
        cells = (
            cell(row["prefill_tokens_per_s"], "prefill"),
            cell(row["decode_tokens_per_s"], "decode"),
            cell(row["resident_weight_bytes"] / 2**20, "resident_weights"),
            cell(None if peak is None else peak / 2**20, "peak"),
        )
        lines.append(f"{name:<18}" + "".join(f"{text:>20}" for text in cells))
    return "\n".join(lines)
