"""How long it takes until the package is there: imports, and the help of the command line.

    python benchmarks/startup.py --out startup.json

Each case is a fresh interpreter; they take turns, so that a busy machine slows all of them, and the medians count.
"beyond" is the time over that of the case it is compared with. Exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import cpu_name, markdown

from optimum_mobilequant.run.prepare import versions


@dataclass(frozen=True)
class Case:
    """Arguments of the interpreter; the case to compare with; the seconds allowed beyond it."""

    arguments: tuple[str, ...]
    against: str | None = None
    limit: float | None = None


def _code(text: str) -> tuple[str, ...]:
    return ("-c", text)


_CLI = ("-m", "optimum_mobilequant.cli")
CASES = {
    "python": Case(_code("pass")),
    "import transformers": Case(_code("import transformers"), "python"),
    "import transformers, optimum_mobilequant": Case(
        _code("import transformers, optimum_mobilequant"), "import transformers", 0.3
    ),
    "import optimum_mobilequant": Case(_code("import optimum_mobilequant"), "python", 0.3),
    "mobilequant --help": Case((*_CLI, "--help"), "python", 0.5),
    "mobilequant quantize --help": Case((*_CLI, "quantize", "--help"), "python", 0.5),
}


def measure(repeat: int) -> dict[str, float]:
    """Median seconds of each case; one turn before them warms up the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(repeat + 1):
        for name, case in CASES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *case.arguments], check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rows_of(seconds: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name, case in CASES.items():
        beyond = None if case.against is None else seconds[name] - seconds[case.against]
        rows.append(
            {"case": name, "seconds": seconds[name], "against": case.against, "beyond": beyond, "limit": case.limit}
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    rows = rows_of(measure(args.repeat))
    content = {"cpu": cpu_name(), "repeat": args.repeat, "versions": versions(), "rows": rows}
    args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    table = [(r["case"], cell(r["seconds"]), r["against"] or "", cell(r["beyond"]), cell(r["limit"])) for r in rows]
    print(markdown(("case", "seconds", "compared with", "beyond it", "limit"), table))
    return int(any(row["limit"] is not None and row["beyond"] > row["limit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
