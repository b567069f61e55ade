"""``mobilequant ladder``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from .common import AddCommand, check_device, check_model, load, positive, print_json, read_text
from .quantize import check_dataset, field


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("ladder", "Quantize a float model with several recipes and presets, and compare the results.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("model", metavar="MODEL", help="folder of a saved float model, or a Hub id (owner/name)")
    parser.add_argument("--dataset", required=True, metavar="FILE|NAME", help="calibration text: a file or a name")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score, not the calibration text")
    parser.add_argument("--recipes", type=names, metavar="A,B", help="from the bottom of the ladder up")
    parser.add_argument("--presets", type=names, metavar="A,B", help="w8a8,w4a8,w8a8-full unless given")
    parser.add_argument("--effort", default="default", help="time spent on learning: none, light, default or best")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling and learning")
    parser.add_argument("--seq-len", type=positive, default=256, metavar="N", help="tokens in a scored window (256)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--run-dir", metavar="DIR", help="keep each stage and result here; the same command goes on")
    parser.add_argument(
        "--set",
        dest="fields",
        type=field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another MobileQuantConfig field, for all recipes; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")


def run_command(args: argparse.Namespace) -> int:
    model_name = check_model(args.model)
    text = read_text(args.text)
    options: dict[str, Any] = {"effort": args.effort, "seed": args.seed}
    for key, value in args.fields:
        if key in ("preset", "recipe", "dataset", "effort", "seed", "run_dir", "device"):
            raise ValueError(f"--set {key}=... has an option of its own")
        if key in options:
            raise ValueError(f"--set {key}=... is given twice: keep one")
        options[key] = value

    import torch

    from optimum_mobilequant import MobileQuantConfig
    from optimum_mobilequant.evaluate.ladder import RUNG_PRESETS, RUNGS, ladder, table
    from optimum_mobilequant.log import show_progress_lines

    show_progress_lines()
    check_dataset(MobileQuantConfig(dataset=args.dataset))
    device = check_device(args.device)
    _, tokenizer = load(model_name, dtype=torch.float32)
    rungs = ladder(
        lambda: load(model_name, dtype=torch.float32)[0].to(device),
        tokenizer,
        args.dataset,
        text,
        recipes=args.recipes or RUNGS,
        presets=args.presets or RUNG_PRESETS,
        options=options,
        seq_len=args.seq_len,
        run_dir=args.run_dir,
    )
    if args.json:
        print_json([asdict(rung) for rung in rungs])
    else:
        print(table(rungs))
    return 0


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
