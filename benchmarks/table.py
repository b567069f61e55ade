"""The JSON file of a benchmark: a row is written as it is measured, and one that is there is not measured again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from optimum_mobilequant.run.prepare import versions


class Table:
    """Each row knows the run (versions, machine, date) that measured it.

    Args:
        path: the file. append: go on with the one that is there.
        settings: what all rows have in common; a file with other settings is refused.
        keys: the columns that tell rows apart.
        cells: what to print of a row, a text for each column of ``header``.
        about: more to keep in the file, as it is now.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        append: bool,
        keys: tuple[str, ...],
        header: tuple[str, ...],
        cells: Callable[[dict[str, Any]], Iterable[str]],
        about: dict[str, Any] | None = None,
    ):
        self.path, self.settings, self.keys, self.about = path, settings, keys, about or {}
        self.header, self.cells = header, cells
        self.rows: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.texts: dict[str, Any] = {}
        if path.exists():
            if not append:
                raise SystemExit(f"{path} exists: give another --out, or --append to add the missing rows")
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] != settings:
                raise SystemExit(f"{path} was measured with {stored['settings']}, not {settings}: give another --out")
            self.rows, self.runs, self.texts = stored["rows"], stored["runs"], stored["texts"]
        self.runs.append(
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
        )

    def use_text(self, model: str, text: dict[str, Any]) -> None:
        if self.texts.setdefault(model, text) != text:
            raise SystemExit(f"{self.path} was measured with another text of {model}: {self.texts[model]}")

    def find(self, *key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if tuple(row[name] for name in self.keys) == key), None)

    def has(self, *key: Any) -> bool:
        return self.find(*key) is not None

    def add(self, *key: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Store a row, and print it."""
        row = dict(zip(self.keys, key, strict=True)) | values
        self.rows.append(row | {"run": len(self.runs) - 1})
        content = {"settings": self.settings, "runs": self.runs, **self.about, "texts": self.texts, "rows": self.rows}
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        print("  ".join(self.cells(row)), flush=True)
        return row

    def markdown(self) -> str:
        return markdown(self.header, map(self.cells, self.rows))


def reusable(
    path: Path, settings: dict[str, Any], texts: dict[str, Any], *, without: Collection[str] = ()
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of a file of quality.py or ladder.py that mean here what they mean there, and where each comes from.

    Args:
        settings: of the table that takes them, ``seed`` included. texts: what the models are measured on.
        without: settings that make no difference to the rows that are wanted.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    theirs = {name: value for name, value in stored["settings"].items() if name not in without}
    others = {name for name, value in theirs.items() if settings.get(name) != value}
    if others:
        raise SystemExit(f"{path} was measured with other settings ({', '.join(sorted(others))}): leave --reuse out")
    for row in stored["rows"]:
        run, seed = stored["runs"][row["run"]], 0 if row["preset"] == "float32" else settings["seed"]
        same = row.get("seed", settings["seed"]) == seed and stored["texts"][row["model"]] == texts.get(row["model"])
        if same and row["gap"] is not None and not run.get("version"):
            yield row, {"from": path.name, "measured": run["date"]}


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
