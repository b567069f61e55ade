"""What a report is made of: all that a checkpoint or a run directory says about itself, and errors on a text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checkpoint.record import is_checkpoint
from ..inspection import inspect_checkpoint
from ..run_dir import STAGES
from .sites import SiteErrors, measure_sites

FINGERPRINT = "fingerprint.json"


@dataclass
class Report:
    """Plain JSON types throughout; a part that is not there is empty.

    Attributes:
        title: name of the folder. kind: ``"checkpoint"`` or ``"run"``.
        settings: options of the run that differ from the defaults. recorded: what the run measured.
        rows: every tensor, as :class:`~optimum_mobilequant.inspection.Inspection` lists it. totals: sizes.
        history: stage -> pairs of step and validation loss.
        stages: stage of a run directory -> "finished", "under way" or "-".
        calibrated: activation -> smallest and largest value that calibration saw, where a run directory is given.
        scales: learned parameter -> smallest, median and largest value, where a run directory is given.
        sites: errors measured on a text; None without one.
        command: what made the report.
    """

    title: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    calibrated: dict[str, tuple[float, float]] = field(default_factory=dict)
    scales: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    sites: SiteErrors | None = None
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def perplexity(self) -> dict[str, float]:
        """Recorded validation perplexities that are finite numbers."""
        found = self.recorded.get("validation_perplexity")
        values = found if isinstance(found, Mapping) else {}
        return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def collect_report(
    path: str | PathLike[str],
    *,
    run_dir: str | PathLike[str] | None = None,
    text: str | None = None,
    seq_len: int = 128,
    tokens: int = 1024,
    histogram: str | None = None,
    command: str = "",
) -> Report:
    """Read a checkpoint or a run directory.

    Args:
        path: a checkpoint, or the run directory of a run that is finished, interrupted or under way.
        run_dir: run directory of the checkpoint: adds stages, calibrated ranges and learned scales.
        text: measure the error of every site on it (loads the checkpoint). seq_len: tokens of a window.
            tokens: how many are read.
        histogram: name of the activation whose distribution is shown; None takes the one with the largest error.
        command: kept in the report.

    Raises:
        FileNotFoundError: neither a checkpoint nor a run directory.
        ValueError: a damaged checkpoint, a text without a checkpoint, or an unknown activation.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: give a checkpoint or a run directory")
    if is_checkpoint(folder):
        report = _of_checkpoint(folder)
    elif (folder / FINGERPRINT).is_file():
        if text is not None:
            raise ValueError("errors are measured on a checkpoint: give its folder, and the run directory as run_dir")
        report, run_dir = Report(folder.resolve().name, "run"), run_dir or folder
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} is neither a checkpoint (config.json of mobilequant) nor a run directory ({FINGERPRINT})"
        )
    if run_dir is not None:
        _add_run(report, Path(run_dir).expanduser())
    if text is not None:
        report.sites = measure_sites(folder, text, seq_len=seq_len, tokens=tokens, histogram=histogram)
    report.command = command
    return report


def _of_checkpoint(folder: Path) -> Report:
    listing = inspect_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    recorded = config.get("recorded") or {}
    hidden = {"recorded", "scheme", "quant_method", "format_version"}
    settings = {key: value for key, value in config.items() if key not in hidden and value is not None}
    history = {"learn": [tuple(pair) for pair in recorded.get("history") or []]}
    for stage in ("rounding", "finetune"):
        found = recorded.get(stage)
        if isinstance(found, Mapping):
            history[stage] = [tuple(pair) for pair in found.get("history") or []]
    return Report(
        folder.resolve().name,
        "checkpoint",
        settings,
        {key: value for key, value in recorded.items() if key not in ("history", "passages")},
        listing.rows,
        listing.totals | listing.config,
        {stage: pairs for stage, pairs in history.items() if pairs},
    )


def _add_run(report: Report, folder: Path) -> None:
    if not (folder / FINGERPRINT).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no run directory: it has no {FINGERPRINT}")
    if not report.settings:
        report.settings = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8")).get("settings", {})
    for stage, number in STAGES.items():
        finished = folder / f"{number:02d}_{stage}.safetensors"
        progress = folder / f"{number:02d}_{stage}.progress.safetensors"
        report.stages[stage] = "finished" if finished.is_file() else "under way" if progress.is_file() else "-"
        if finished.is_file() or progress.is_file():
            _read_stage(report, stage, finished if finished.is_file() else progress)


def _read_stage(report: Report, stage: str, file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            meta = json.loads((opened.metadata() or {}).get("meta", "{}"))
            if meta.get("history") and stage not in report.history:
                report.history[stage] = [tuple(pair) for pair in meta["history"]]
            for key in opened.keys():  # noqa: SIM118 (no dict)
                kind, _, name = key.partition("/")
                if stage in ("calibrate", "transform") and kind == "low":
                    high = opened.get_tensor(f"high/{name}")
                    report.calibrated[name] = (float(opened.get_tensor(key)), float(high))
                elif stage == "learn" and (tensor := opened.get_tensor(key)).is_floating_point() and tensor.numel():
                    flat = tensor.float().flatten()
                    report.scales[key] = (float(flat.min()), float(flat.median()), float(flat.max()))
    except (SafetensorError, ValueError, KeyError) as error:
        report.stages[stage] = f"unreadable ({error})"
