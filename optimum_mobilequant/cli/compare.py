"""``mobilequant compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import AddCommand, check_model, positive, print_json, read_text


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("compare", "Run a checkpoint as simulation, on integers and in runtimes, and compare the logits.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by quantize")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--float32", action="store_true", help="also simulate in float32, as tuning does")
    parser.add_argument("--onnx", metavar="DIR", help="its export to onnx, run in ONNX Runtime")
    parser.add_argument("--onnx-float64", action="store_true", help="also run that export in float64")
    parser.add_argument("--htp", action="store_true", help="also run it on the HTP emulator (Linux x86-64)")
    parser.add_argument("--float", dest="float_model", metavar="MODEL", help="the float model it was made from")
    parser.add_argument("--seq-len", type=positive, default=256, metavar="N", help="tokens in a window (256)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="use only the first N tokens of the text")
    parser.add_argument("--no-record", action="store_true", help="do not store the check of an export in its folder")
    parser.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")


def run_command(args: argparse.Namespace) -> int:
    checkpoint = check_model(args.checkpoint)
    float_model = None if args.float_model is None else check_model(args.float_model)
    text = read_text(args.text)

    from optimum_mobilequant.evaluate.compare import compare  # the package import registers the method

    options = {name: getattr(args, name) for name in ("float32", "onnx", "onnx_float64", "htp", "seq_len", "tokens")}
    found = compare(checkpoint, text, float_model=float_model, **options).to_dict()
    if args.onnx and not args.no_record:
        _record(Path(args.onnx).expanduser(), Path(args.text).name, found)
    if args.json:
        print_json(found)
        return 0
    pairs = found.pop("pairs")
    print(f"{'':<20}{'perplexity':>12}{'tokens':>10}{'seconds':>10}")
    for name, values in found.items():
        print(f"{name:<20}{values['perplexity']:>12.5g}{values['tokens']:>10}{values['seconds']:>10.1f}")
    print(f"\n{'':<20}{'SQNR dB':>12}{'argmax':>10}{'equal':>10}{'max LSB':>10}")
    for name, values in pairs.items():
        columns = (_share(values["argmax"]), _share(values["equal"]), _number(values["max_lsb"]))
        print(f"{name:<20}{values['sqnr_db']:>12.1f}" + "".join(f"{column:>10}" for column in columns))
    return 0


def _record(folder: Path, text: str, found: dict[str, Any]) -> None:
    """What ONNX Runtime made of the export, for the model card."""
    from optimum_mobilequant.exporters.folder import record_check
    from optimum_mobilequant.log import get_logger

    pair = found["pairs"]["onnx/integer"]
    words = [
        f"in ONNX Runtime against the integer executor on {text}, {found['onnx']['tokens']} predictions",
        f"{_share(pair['argmax'])} of the tokens chosen alike",
        f"SQNR of the logits {pair['sqnr_db']:.1f} dB",
    ]
    if pair["equal"] is not None:
        words.append(f"{_share(pair['equal'])} of their codes equal, the others at most {pair['max_lsb']} steps apart")
    try:
        record_check(folder, ", ".join(words))
    except (OSError, ValueError) as error:  # a read-only folder must not cost the measurement
        get_logger(__name__).warning(f"the check is not stored in {folder}: {error}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _number(value: Any) -> str:
    return "-" if value is None else str(value)
