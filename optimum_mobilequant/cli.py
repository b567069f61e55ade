"""The ``mobilequant`` command: quantize, eval, inspect, doctor.

The same parser serves ``optimum-cli mobilequant``. Torch and transformers are imported inside the run functions only,
so help and usage errors come at once. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

BAD_INPUT = 2  # the exit code argparse uses for its own usage errors
FAILED_RUN = 1
_CONFIG_OPTIONS = ("preset", "dataset", "recipe", "effort", "seed")  # options that are fields of the config


def build_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """Adds the commands to ``parser``, or to a new parser named ``mobilequant``; returns it."""
    if parser is None:
        parser = argparse.ArgumentParser("mobilequant", description="Integer-only quantization for phone NPUs.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show Python's whole traceback")
    commands = parser.add_subparsers(title="commands", dest="mobilequant_command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        # Abbreviated options would change their meaning when a new option is added.
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    quantize = add("quantize", "Quantize a float model and save it.")
    quantize.set_defaults(run_command=_quantize)
    quantize.add_argument("model", metavar="MODEL", help="folder of a saved float model, or a Hub id (owner/name)")
    quantize.add_argument("--preset", required=True, help="bits of weights and activations, such as w8a8 or w4a8")
    quantize.add_argument("--dataset", required=True, metavar="FILE|NAME", help="calibration text: a file or a name")
    quantize.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    quantize.add_argument(
        "--recipe",
        help="mobilequant (the default), rtn, smoothquant, smoothquant-edge, omniquant-static or omniquant-edge",
    )
    quantize.add_argument("--effort", help="time spent on learning: none, light, default or best")
    quantize.add_argument("--run-dir", metavar="DIR", help="keep each stage here; the same command then resumes")
    quantize.add_argument("--seed", type=int, metavar="N", help="seed of sampling and learning")
    quantize.add_argument("--device", default="cpu", metavar="D", help="cpu (the default), cuda, cuda:1, ...")
    quantize.add_argument("--overwrite", action="store_true", help="replace the model in --out, once all is done")
    quantize.add_argument(
        "--set",
        dest="fields",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other MobileQuantConfig field; the value is read as JSON if it is JSON, else as text; repeatable",
    )

    evaluate = add("eval", "Measure the perplexity of a float model or of a quantized checkpoint.")
    evaluate.set_defaults(run_command=_eval)
    evaluate.add_argument("model", metavar="MODEL_OR_CHECKPOINT", help="folder of a saved model, or a Hub id")
    evaluate.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    evaluate.add_argument("--seq-len", type=_positive, default=256, metavar="N", help="tokens in a window (256)")
    evaluate.add_argument("--bos", action="store_true", help="begin each window with the tokenizer's BOS token")
    evaluate.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")

    inspect = add("inspect", "List the tensors of a quantized checkpoint without loading the model.")
    inspect.set_defaults(run_command=_inspect)
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by quantize")
    inspect.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")

    doctor = add("doctor", "Report versions, hardware and what works here; paste it into a bug report.")
    doctor.set_defaults(run_command=_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs a parsed command.

    Returns:
        The exit code: 0, 1 (the run failed, or doctor found a fault), 2 (bad input), 130 (interrupted).
    """
    try:
        code: int = args.run_command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `mobilequant inspect ... | head` closed the pipe: no fault of the input
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        hint = ": the same command resumes" if getattr(args, "run_dir", None) else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if args.traceback:
            traceback.print_exc()
        # Some libraries raise texts of several lines; a script that reads stderr gets one line.
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (RuntimeError, FloatingPointError)):  # the run failed: diverged, out of memory, ...
            print(f"error: {message} (--traceback shows where)", file=sys.stderr)
            return FAILED_RUN
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``mobilequant``; returns the exit code."""
    return run(build_parser().parse_args(argv))


# Commands ------------------------------------------------------------------------------------------------------------


def _quantize(args: argparse.Namespace) -> int:
    out = Path(args.out).expanduser().resolve()
    model_name = _check_model(args.model)
    _check_output(out, args.overwrite)
    for option, name in (("MODEL", model_name), ("--dataset", args.dataset), ("--run-dir", args.run_dir)):
        _check_apart(out, option, name)
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

    show_progress_lines()
    config = MobileQuantConfig.from_dict(fields)
    _check_dataset(config)
    device = _check_device(args.device)
    model, tokenizer = _load(model_name, dtype=torch.float32)
    model = quantize(model.to(device), tokenizer, config, run_dir=args.run_dir)
    staged = out.with_name(f".{out.name}.{os.getpid()}.partial")
    staged.mkdir(parents=True)
    try:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            again = "run the same command again" if args.run_dir else "run again, with --run-dir to keep the stages"
            raise OSError(f"{out} was not written ({error}): free some space and {again}") from error
        raise
    _put_in_place(staged, out, args.overwrite)
    print(f"saved {out} ({sum(path.stat().st_size for path in out.rglob('*') if path.is_file()):,} bytes)")
    return 0


def _eval(args: argparse.Namespace) -> int:
    model_name = _check_model(args.model)
    text_path = Path(args.text).expanduser()
    if not text_path.is_file():
        raise FileNotFoundError(f"no text file {args.text!r}: give --text a UTF-8 file")
    try:
        text = text_path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text!r} is not UTF-8 ({error}): convert it first") from error
    if not text.strip():
        raise ValueError(f"{args.text!r} is empty: give --text a file with text")

    from optimum_mobilequant.evaluate.perplexity import perplexity  # the package import registers the method

    model, tokenizer = _load(model_name, dtype="auto")
    result = perplexity(model, tokenizer, text, seq_len=args.seq_len, bos=args.bos)
    values = {key: getattr(result, key) for key in ("perplexity", "word_perplexity", "tokens", "seconds")}
    if args.json:
        _print_json(values)
    else:
        for key, value in values.items():
            print(f"{key.replace('_', ' '):<18}{value if isinstance(value, int) else format(value, '.6g')}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from optimum_mobilequant.inspection import inspect_checkpoint

    listing = inspect_checkpoint(args.checkpoint)
    if args.json:
        _print_json(listing.to_dict())
    else:
        print(listing.table())
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from optimum_mobilequant.doctor import report, table

    found = report()
    if args.json:
        _print_json(found)
    else:
        print(table(found))
    return 0 if found["ok"] else FAILED_RUN


# Checks, all before any model is loaded ------------------------------------------------------------------------------


def _field(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FIELD=VALUE, such as samples=64")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _check_model(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name!r} has no config.json: give a folder written by save_pretrained")
        return str(path)
    if path.exists():
        raise ValueError(f"{name!r} is a file: give the folder of a saved model")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"no folder {name!r}, and a Hub id has the form owner/name: check MODEL") from error
    return name


def _check_dataset(config: Any) -> None:
    """Reads until the first text: a missing file or column would otherwise show only once the model is loaded."""
    from optimum_mobilequant.sources import iter_documents

    documents = iter_documents(config.dataset, split=config.dataset_split, text_column=config.text_column)
    if not any(True for document in documents for _ in document):
        raise ValueError(f"{config.dataset!r} is empty: give --dataset a file or a data set with text")


def _check_output(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise ValueError(f"{out} is not empty: give another --out, or --overwrite to replace it")
        if not (out / "config.json").is_file():  # --out with a slip of the finger must not take a home folder away
            raise ValueError(f"{out} holds no saved model, so --overwrite leaves it alone: give another --out")
    elif out.exists():
        raise ValueError(f"{out} is a file: give --out a folder")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write in {parent}: give another --out")


def _check_apart(out: Path, option: str, name: str | None) -> None:
    """Replacing ``out`` must not take an input away."""
    if name is None:
        return
    path = Path(name).expanduser().resolve()
    # A name that is no path here is a Hub id; only the run folder may be made later.
    if (path.exists() or option == "--run-dir") and (path == out or out in path.parents):
        raise ValueError(f"{option} {name!r} is inside --out {str(out)!r}: give another --out")


def _check_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for "unknown", "not built in" and "no such card"
        raise ValueError(f"device {name!r} cannot be used here ({error}): see `mobilequant doctor`") from error
    return device


# Files and models ----------------------------------------------------------------------------------------------------


def _load(name: str, dtype: Any) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except ValueError as error:
            raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
            raise ValueError(
                f"{name!r} lacks {len(missing)} weights, among them {', '.join(missing[:4])}: config.json and weights "
                "do not belong together, or the model is no causal language model"
            )
        return model, tokenizer
    except SafetensorError as error:
        raise ValueError(f"a weight file of {name!r} is damaged or truncated ({error}): download it again") from error
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(f"no folder {name!r} here, and the Hub did not give it: {error}") from error


def _put_in_place(staged: Path, out: Path, overwrite: bool) -> None:
    """Renames ``staged`` to ``out``. If that fails, the old ``out`` is back and the new result stays in ``staged``."""
    previous = out.with_name(f".{out.name}.{os.getpid()}.previous")
    try:
        _check_output(out, overwrite)  # it may have been filled during the long run
        if out.exists():
            out.rename(previous)
        try:
            staged.rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
    except (OSError, ValueError) as error:
        raise OSError(f"{error} (the finished model is in {staged})") from error
    if previous.exists():
        shutil.rmtree(previous)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
