"""The rows of a ladder, from the files that this project writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluate.ladder import LADDER_FILE

# Columns that tell rows of the same recipe apart, in files of several models.
_NAMES = ("model", "variant", "preset", "recipe", "case", "seed")
_NUMBERS = ("perplexity", "gap", "minutes", "peak_memory_bytes")


def find_ladder(folder: Path, *, run: bool) -> list[dict[str, Any]]:
    """The ladder in ``folder``, or, for the run directory of one of its rungs, the one beside it; else nothing."""
    for place in (folder, folder.resolve().parent) if run else (folder,):
        if (place / LADDER_FILE).is_file():
            return read_ladder(place / LADDER_FILE)
    return []


def read_ladder(file: Path) -> list[dict[str, Any]]:
    """Rows of ``mobilequant ladder --json``, of its run directory's ``ladder.json``, of ``benchmarks/`` or the demo.

    Returns:
        For each row ``name``, ``perplexity``, ``gap``, ``minutes``, ``peak_memory_bytes`` (None where there is none),
        ``added`` and ``error``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else, or no rows.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}: give --ladder what `mobilequant ladder --json` printed")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        found = stored.get("rungs", stored.get("rows")) if isinstance(stored, Mapping) else stored
        rows = [_row(row) for row in found]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{str(file)!r} holds no ladder ({error}): give --ladder what `mobilequant ladder --json` printed"
        ) from error
    if not rows:
        raise ValueError(f"{str(file)!r} has no rows yet: nothing to report")
    same = [key for key in _NAMES if len({str(row["columns"].get(key)) for row in rows}) == 1]
    for row in rows:
        columns = row.pop("columns")
        shown = [str(value) for key, value in columns.items() if key not in same or key in ("recipe", "case")]
        row["name"] = " ".join(shown)
    return rows


def _row(stored: Mapping[str, Any]) -> dict[str, Any]:
    columns = {key: stored[key] for key in _NAMES if key in stored}
    if not {"recipe", "case"} & columns.keys() or not stored.keys() & {"perplexity", "error"}:
        raise ValueError("a row has no recipe or no result")
    numbers = {key: stored.get(key) for key in _NUMBERS}
    for key, value in numbers.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{key} is {value!r}")
    return {"columns": columns, **numbers, "added": list(stored.get("added") or ()), "error": stored.get("error")}
