"""What a report is made of: all that a checkpoint or a run directory says about itself, and errors on a text."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..checkpoint.inspection import inspect_checkpoint
from ..checkpoint.record import is_checkpoint
from ..config import MobileQuantConfig
from ..evaluate.ladder import LADDER_FILE
from ..run.run_dir import FINGERPRINT
from .ladder import find_ladder, read_ladder
from .run import add_run
from .sites import SiteErrors, measure_sites

# Not options of a run: what came out of it, and where it was.
_NOT_OPTIONS = ("recorded", "scheme", "quant_method", "format_version", "run_dir", "device")


@dataclass
class Report:
    """Plain JSON types throughout; a part that is not there is empty.

    Attributes:
        title: name of the folder. kind: ``"checkpoint"``, ``"run"`` or ``"ladder"``.
        settings: options of the run that differ from the defaults. recorded: what the run measured.
        rows: every tensor, as :class:`~optimum_mobilequant.checkpoint.inspection.Inspection` lists it. totals: sizes.
        history: stage -> pairs of step and validation loss.
        stages: stage of a run directory -> "finished", "under way" or "-".
        calibrated: activation -> smallest and largest value that calibration saw, where a run directory is given.
        learned: kind of parameter -> its name -> smallest, median and largest value, where a run directory is given:
            ``"transforms"`` as factors, ``"clips"`` as the share of the range that stays, ``"matrices"`` as they are.
        ladder: rows of name, perplexity, gap, minutes, what was added, error; see :func:`.ladder.read_ladder`.
        sites: errors measured on a text; None without one.
        rerun: the command that does the run again. command: what made the report.
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
    learned: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)
    ladder: list[dict[str, Any]] = field(default_factory=list)
    sites: SiteErrors | None = None
    rerun: str = ""
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

    @property
    def missing(self) -> list[str]:
        """What else a report can show, and what it needs for that."""
        wanted = []
        if self.kind == "checkpoint" and self.sites is None:
            wanted.append("--text FILE adds the error of every activation, the worst sites and their distributions")
        if self.kind == "checkpoint" and not self.stages:
            wanted.append("--run-dir DIR, the run's own, adds stages, ranges before learning and learned parameters")
        if self.kind == "run":
            wanted.append("the finished checkpoint in place of the run directory adds scores, sizes and bits")
        if not self.ladder:
            wanted.append("--ladder FILE, from `mobilequant ladder --json`, adds the other recipes beside this one")
        return wanted


def collect_report(
    path: str | PathLike[str],
    *,
    run_dir: str | PathLike[str] | None = None,
    ladder: str | PathLike[str] | None = None,
    text: str | None = None,
    seq_len: int = 128,
    tokens: int = 1024,
    histogram: str | None = None,
    command: str = "",
) -> Report:
    """Read a checkpoint, a run directory or the folder of a ladder.

    Args:
        path: a checkpoint; the run directory of a run that is finished, interrupted or under way; or that of a ladder.
        run_dir: run directory of the checkpoint: adds stages, calibrated ranges and learned parameters.
        ladder: results of ``mobilequant ladder --json`` or of a script in ``benchmarks/``; None takes the
            ``ladder.json`` in ``path``, or beside a run of a ladder.
        text: measure the error of every site on it (loads the checkpoint). seq_len: tokens of a window.
            tokens: how many are read.
        histogram: name of the activation whose distribution is shown first; None takes the one with the largest error.
        command: kept in the report.

    Raises:
        FileNotFoundError: nothing of the kind there.
        ValueError: a damaged checkpoint, a text without a checkpoint, an unknown activation, or a run without any
            result yet.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: give a checkpoint or a run directory")
    checkpoint, run = is_checkpoint(folder), (folder / FINGERPRINT).is_file()
    if text is not None and not checkpoint and (run or (folder / LADDER_FILE).is_file()):
        raise ValueError("errors are measured on a checkpoint: give its folder, and the run directory as run_dir")
    rungs = find_ladder(folder, run=run) if ladder is None else read_ladder(Path(ladder).expanduser())
    if checkpoint:
        report = _of_checkpoint(folder)
    elif run:
        report, run_dir = Report(folder.resolve().name, "run"), run_dir or folder
    elif (folder / LADDER_FILE).is_file():
        report = Report(folder.resolve().name, "ladder")
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} is neither a checkpoint (config.json of mobilequant) nor a run directory ({FINGERPRINT})"
        )
    report.ladder = rungs
    if run_dir is not None:
        stored = add_run(report, Path(run_dir).expanduser())
        report.settings = report.settings or options_of(stored)
    if report.kind == "run" and all(state == "-" for state in report.stages.values()):
        raise ValueError(
            f"no results to report: no stage of the run in {str(folder)!r} has begun; start it again with the same "
            "command, or give another folder"
        )
    if report.kind != "ladder":
        report.rerun = rerun_command(report.settings, report.recorded)
    if text is not None:
        report.sites = measure_sites(folder, text, seq_len=seq_len, tokens=tokens, histogram=histogram)
    report.command = command
    return report


def _of_checkpoint(folder: Path) -> Report:
    listing = inspect_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    recorded = config.get("recorded") or {}
    settings = options_of(config)
    history = {"learn": [tuple(pair) for pair in recorded.get("history") or []]}
    for stage, name in (("round", "rounding"), ("finetune", "finetune")):
        found = recorded.get(name)
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


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored config says of the run: its name, data and seed, and what differs from the defaults."""
    default = MobileQuantConfig().to_dict()
    always = ("preset", "recipe", "effort", "dataset", "seed")
    kept = {key: value for key, value in config.items() if key not in _NOT_OPTIONS and value is not None}
    return {key: value for key, value in kept.items() if key in always or value != default.get(key)}


def rerun_command(settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """The command line that repeats a run: every option that differs from its default.

    MODEL and FILE stand for names that are not kept.
    """
    default = MobileQuantConfig().to_dict()
    dataset = settings.get("dataset")
    words = ["mobilequant", "quantize", str(recorded.get("base_model") or "MODEL")]
    words += ["--preset", str(settings.get("preset", default["preset"]))]
    words += ["--dataset", dataset if isinstance(dataset, str) else "FILE"]
    for name, value in settings.items():
        if name in (*_NOT_OPTIONS, "preset", "dataset") or value is None or value == default.get(name):
            continue
        if name in ("recipe", "effort", "seed", "bits"):
            words += [f"--{name}", str(value)]
        else:
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join([*words, "--out", "DIR"])
