"""``mobilequant quantize``."""

from __future__ import annotations

import argparse
import errno
import glob
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from .common import AddCommand, check_apart, check_device, check_model, check_output, load, put_in_place

_CONFIG_OPTIONS = ("preset", "dataset", "recipe", "effort", "seed", "bits")  # options that are fields of the config


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("quantize", "Quantize a float model and save it.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("model", metavar="MODEL", help="folder of a saved float model, or a Hub id (owner/name)")
    parser.add_argument("--preset", required=True, help="bits of weights and activations, such as w8a8 or w4a8")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="FILE|NAME",
        help="calibration text: a file or a name; self lets the model write it",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument(
        "--recipe",
        help="best (the default; at effort none and light mobilequant), mobilequant, qad, rtn, smoothquant, "
        "smoothquant-edge, omniquant-static, omniquant-edge, adpq, gptq or qqq",
    )
    parser.add_argument("--effort", help="time spent on learning: none, light, default or best")
    parser.add_argument(
        "--bits", metavar="auto:SIZE", help="choose the weight bits of each layer: auto:1.2GB, auto:4.5 or auto:device"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="keep each stage here; the same command then resumes")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling and learning")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out, once all is done")
    parser.add_argument(
        "--set",
        dest="fields",
        type=field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other MobileQuantConfig field; the value is read as JSON if it is JSON, else as text; repeatable",
    )


def run_command(args: argparse.Namespace) -> int:
    out = Path(args.out).expanduser().resolve()
    model_name = check_model(args.model)
    check_output(out, args.overwrite)
    for option, name in (("MODEL", model_name), ("--dataset", args.dataset), ("--run-dir", args.run_dir)):
        check_apart(out, option, name)
    fields = {key: getattr(args, key) for key in _CONFIG_OPTIONS if getattr(args, key) is not None}
    for key, value in args.fields:
        if key in (*_CONFIG_OPTIONS, "run_dir", "device"):
            raise ValueError(f"--set {key}=... has an option of its own: use --{key.replace('_', '-')}")
        if key in fields:
            raise ValueError(f"--set {key}=... is given twice: keep one")
        fields[key] = value

    import torch
    from safetensors import SafetensorError

    from optimum_mobilequant import MobileQuantConfig, quantize
    from optimum_mobilequant.log import show_progress_lines
    from optimum_mobilequant.run.summary import summary

    show_progress_lines()
    config = MobileQuantConfig.from_dict(fields)
    check_dataset(config)
    device = check_device(args.device)
    model, tokenizer = load(model_name, dtype=torch.float32)
    parameters = model.num_parameters()
    model = quantize(model.to(device), tokenizer, config, run_dir=args.run_dir)
    staged = out.with_name(f".{out.name}.{os.getpid()}.partial")
    _remove_unfinished(out)
    staged.mkdir(parents=True)
    try:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        # a full disk, in the words of safetensors and of everything else
        if isinstance(error, SafetensorError) or getattr(error, "errno", None) == errno.ENOSPC:
            again = "run the same command again" if args.run_dir else "run again, with --run-dir to keep the stages"
            raise OSError(f"{out} was not written ({error}): free some space and {again}") from error
        raise
    put_in_place(staged, out, args.overwrite)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    stored = json.loads((out / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    print(summary(stored.get("recorded") or {}, size, parameters, out))
    print(f"next: mobilequant report {shlex.quote(str(out))} --text FILE --out report.html")
    return 0


def _remove_unfinished(out: Path) -> None:
    """What a process left that was killed while it saved."""
    import psutil

    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def field(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FIELD=VALUE, such as samples=64")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def check_dataset(config: Any) -> None:
    """Reads until the first text: a missing file or column would otherwise show only once the model is loaded."""
    from optimum_mobilequant.data.sources import SELF, iter_documents

    if config.dataset == SELF:
        return
    documents = iter_documents(config.dataset, split=config.dataset_split, text_column=config.text_column)
    if not any(True for document in documents for _ in document):
        raise ValueError(f"{config.dataset!r} is empty: give --dataset a file or a data set with text")
