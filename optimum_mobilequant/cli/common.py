"""What several commands share: argument types, checks made before any model is loaded, files, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAD_INPUT = 2  # the exit code argparse uses for its own usage errors
FAILED_RUN = 1
# (name, one line of help) -> the command's own parser
AddCommand = Callable[[str, str], argparse.ArgumentParser]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def check_model(name: str) -> str:
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


def read_text(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no text file {name!r}: give --text a UTF-8 file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is not UTF-8 ({error}): convert it first") from error
    if not text.strip():
        raise ValueError(f"{name!r} is empty: give --text a file with text")
    return text


def check_output(out: Path, overwrite: bool) -> None:
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


def check_apart(out: Path, option: str, name: str | None) -> None:
    """Replacing ``out`` must not take an input away."""
    if name is None:
        return
    path = Path(name).expanduser().resolve()
    # A name that is no path here is a Hub id; only the run folder may be made later.
    if (path.exists() or option == "--run-dir") and (path == out or out in path.parents):
        raise ValueError(f"{option} {name!r} is inside --out {str(out)!r}: give another --out")


def check_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for "unknown", "not built in" and "no such card"
        raise ValueError(f"device {name!r} cannot be used here ({error}): see `mobilequant doctor`") from error
    return device


def load(name: str, dtype: Any) -> tuple[Any, Any]:
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


def put_in_place(staged: Path, out: Path, overwrite: bool) -> None:
    """Renames ``staged`` to ``out``. If that fails, the old ``out`` is back and the new result stays in ``staged``."""
    previous = out.with_name(f".{out.name}.{os.getpid()}.previous")
    try:
        check_output(out, overwrite)  # it may have been filled during the long run
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


def print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
