"""``mobilequant export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..exporters.options import DEFAULT_CONTEXT, DEFAULT_PROMPT_LENGTH, ENCODINGS_VERSIONS, EXPORTERS
from .common import AddCommand, check_model, positive, print_json

# Options that are arguments of export().
_OPTIONS = (
    "context", "prompt_length", "dynamic", "encodings_version", "soc", "device", "wait", "all_inputs", "overwrite"
)  # fmt: skip


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("export", "Write a quantized checkpoint in the form that a runtime or a converter reads.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by quantize")
    parser.add_argument(
        "--to",
        required=True,
        choices=EXPORTERS,
        help="; ".join(f"{name}: {exporter.summary}" for name, exporter in EXPORTERS.items()),
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"cached and new tokens together ({DEFAULT_CONTEXT}, or the model's positions if fewer)",
    )
    parser.add_argument(
        "--prompt-length",
        type=positive,
        metavar="N",
        help=f"new tokens of the prompt graph ({DEFAULT_PROMPT_LENGTH}, or half the context if less)",
    )
    parser.add_argument("--dynamic", action="store_true", help="onnx: also a graph with symbolic sizes")
    parser.add_argument(
        "--encodings-version", choices=ENCODINGS_VERSIONS, default="1.0.0", help="qnn: layout of the encodings file"
    )
    parser.add_argument(
        "--soc", default="sm8650", metavar="NAME", help="genie: system on chip of the binaries (sm8650)"
    )
    parser.add_argument("--device", metavar="NAME", help="ai-hub: device to compile for and to run on")
    parser.add_argument("--wait", action="store_true", help="ai-hub: wait for the jobs")
    parser.add_argument(
        "--all-inputs", action="store_true", help="compressed-tensors: also encodings that only transformers reads"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --out, once all is done"
    )
    parser.add_argument("--json", action="store_true", help="print the files and the summary as JSON")


def run_command(args: argparse.Namespace) -> int:
    if not Path(check_model(args.checkpoint)).is_dir():
        raise FileNotFoundError(f"no folder {args.checkpoint!r}: export reads a checkpoint saved on this machine")

    from optimum_mobilequant.exporters import export
    from optimum_mobilequant.log import show_progress_lines

    show_progress_lines()
    options = {name: getattr(args, name) for name in _OPTIONS}
    result = export(args.checkpoint, args.to, args.out, **options)
    if args.json:
        about = {"target": result.target, "path": str(result.path)}
        print_json(about | {"files": dict(result.files), "summary": dict(result.summary)})
    else:
        for name, size in result.files.items():
            print(f"{size:>15,}  {name}")
        going_on = result.summary.get("continue") if result.summary.get("finished") is False else None
        state = f"sent, not finished; continue with: {going_on}\n" if going_on else "saved "
        print(f"{state}{result.path} ({sum(result.files.values()):,} bytes)")
    return 0
