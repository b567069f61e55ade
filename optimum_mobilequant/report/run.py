"""What a run directory adds to a report: stages, losses, calibrated ranges, learned parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..run.run_dir import FINGERPRINT, STAGES

if TYPE_CHECKING:
    from .collect import Report

# Parameters of the stage "learn" -> what is shown of them.
_KINDS = {"scales": ("transforms", "exp"), "clips": ("clips", "sigmoid"), "matrices": ("matrices", "clone")}


def add_run(report: Report, folder: Path) -> dict[str, Any]:
    """Read every stage file that is there; one that cannot be read is named, not raised.

    Returns:
        the run's settings.

    Raises:
        FileNotFoundError: no run directory.
    """
    if not (folder / FINGERPRINT).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no run directory: it has no {FINGERPRINT}")
    for stage, position in STAGES.items():
        finished = folder / f"{position:02d}_{stage}.safetensors"
        progress = folder / f"{position:02d}_{stage}.progress.safetensors"
        report.stages[stage] = "finished" if finished.is_file() else "under way" if progress.is_file() else "-"
        if finished.is_file() or progress.is_file():
            _read(report, stage, finished if finished.is_file() else progress)
    settings: dict[str, Any] = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8")).get("settings", {})
    return settings


def _read(report: Report, stage: str, file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            meta = json.loads((opened.metadata() or {}).get("meta", "{}"))
            history = meta.get("history") or meta.get("result", {}).get(
                "history"
            )  # of a finished stage, of a snapshot
            if history and stage not in report.history:
                report.history[stage] = [tuple(pair) for pair in history]
            if report.stages[stage] == "under way" and "step" in meta:
                report.stages[stage] = f"under way, {meta['step']} steps done"
            for key in opened.keys():  # noqa: SIM118 (no dict)
                if stage in ("calibrate", "transform") and key.startswith("low/"):
                    name = key.removeprefix("low/")
                    low, high = opened.get_tensor(key), opened.get_tensor(f"high/{name}")
                    report.calibrated[name] = (float(low), float(high))
                elif stage == "learn":
                    _learned(report, key, opened)
    except (SafetensorError, ValueError, KeyError) as error:
        report.stages[stage] = f"unreadable ({error})"


def _learned(report: Report, key: str, opened: Any) -> None:
    """Keep the smallest, median and largest value of a parameter; of a snapshot, of the best state so far."""
    kind, _, name = key.removeprefix("best.").partition(".")
    if kind not in _KINDS:
        return
    shown, function = _KINDS[kind]
    values: Tensor = opened.get_tensor(key)
    if values.is_floating_point() and values.numel():
        flat = getattr(values.float().flatten(), function)()
        found = float(flat.min()), float(flat.median()), float(flat.max())
        report.learned.setdefault(shown, {})[name.replace("/", ".")] = found
