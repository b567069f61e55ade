"""The folder of an export: made as a whole or not at all, and never in place of something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Present in every finished export; what makes a folder one that ``overwrite`` may replace.
RECORD = "export.json"


def check_destination(out: Path, source: Path, overwrite: bool, *, marker: str = RECORD) -> None:
    """Refuse, before any work, an output folder that cannot be made or must not be replaced.

    Args:
        out, source: absolute paths of the result and of the checkpoint.
        marker: a file that, beside :data:`RECORD`, shows that a folder is an export.

    Raises:
        ValueError: ``out`` is in use, holds or is the checkpoint, or cannot be written.
    """
    if out == source or out in source.parents or source in out.parents:
        raise ValueError(f"the output {out} and the checkpoint {source} lie in each other: give another output folder")
    if out.is_dir():
        if any(out.iterdir()):
            if not overwrite:
                raise ValueError(f"{out} is not empty: give another output folder, or overwrite it explicitly")
            if not any((out / name).is_file() for name in (RECORD, marker)):
                raise ValueError(f"{out} holds no export, so it is not overwritten: give another output folder")
    elif out.exists() or out.is_symlink():
        raise ValueError(f"{out} is a file: give a folder")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write in {parent}: give another output folder")


@contextmanager
def staging(out: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends, and is removed if it raises."""
    check_destination(out, source, overwrite)
    staged = out.with_name(f".{out.name}.{os.getpid()}.partial")
    staged.mkdir(parents=True)
    try:
        yield staged
        check_destination(out, source, overwrite)  # it may have been filled during a long run
        _replace(staged, out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


@contextmanager
def resumed(out: Path, marker: str, overwrite: bool) -> Iterator[None]:
    """``out`` itself, for an exporter that goes on from what it finds there.

    With ``overwrite`` the folder starts empty; what it held comes back if the block raises before ``marker`` is there.
    """
    previous = out.with_name(f".{out.name}.{os.getpid()}.previous")
    if overwrite and out.exists():
        out.rename(previous)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made and not (out / marker).is_file():
            shutil.rmtree(out)
            if previous.exists():
                previous.rename(out)
        raise
    finally:
        if previous.exists():
            shutil.rmtree(previous)


def record_check(folder: Path, words: str) -> None:
    """Store in the record of a finished export how it was checked; an earlier check is replaced.

    Args:
        words: one line, for the model card.

    Raises:
        OSError, ValueError: the record cannot be read or written.
    """
    path = folder / RECORD
    record = json.loads(path.read_text(encoding="utf-8"))
    record["summary"]["checked"] = words
    temporary = path.with_name(f".{RECORD}.{os.getpid()}")
    try:
        write_json(temporary, record)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(staged: Path, out: Path) -> None:
    previous = out.with_name(f".{out.name}.{os.getpid()}.previous")
    if out.exists():
        out.rename(previous)
    try:
        staged.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise
    if previous.exists():
        shutil.rmtree(previous)


def write_json(path: Path, value: Any) -> None:
    """UTF-8, indented, NaN refused."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
