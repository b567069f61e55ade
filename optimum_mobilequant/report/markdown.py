"""The report as Markdown, and the tables that both forms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .advice import advice
from .collect import Report

WORST = 12


@dataclass(frozen=True)
class Table:
    """Attributes: heading, names of the columns, rows of text."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(report: Report) -> list[Table]:
    """Every table of a report that has something to show, in order."""
    found = [
        Table("Result", ("", "perplexity", "against float"), _result(report)),
        Table("Size and cost", ("", ""), _sizes(report)),
        Table("Stages", ("stage", "state"), tuple(report.stages.items())),
        Table("Bits", ("integers", "tensors", "bytes"), _bits(report)),
        Table("Worst sites", ("activation", "bits", "SQNR", "clipped", "what to do"), _worst(report)),
        Table("Ranges that moved most", ("activation", "calibrated", "now", "width"), _moved(report)),
        Table("Learned parameters", ("parameter", "smallest", "median", "largest"), _scales(report)),
        Table("Evaluations", ("what", "score", "value"), _evaluations(report)),
        Table("Settings", ("option", "value"), tuple((k, str(v)) for k, v in report.settings.items())),
        Table("Environment", ("package", "version"), _environment(report)),
    ]
    return [table for table in found if table.rows]


def to_markdown(report: Report) -> str:
    """One Markdown page."""
    parts = [f"# {report.title}", f"A {report.kind} of optimum-mobilequant."]
    for table in tables_of(report):
        parts += [f"## {table.heading}", _rows(table)]
    if report.command:
        parts.append(f"Made by `{report.command}`.")
    return "\n\n".join(parts) + "\n"


def _rows(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)])


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def _result(report: Report) -> tuple[tuple[str, ...], ...]:
    values = report.perplexity
    names = {
        "float": "float model",
        "float_prefix": "float model behind the prefix",
        "start": "quantized, before learning",
        "quantized": "this checkpoint",
    }

    def gap(key: str) -> str:
        return f"{values[key] / values['float'] - 1:+.2%}" if "float" in values and key != "float" else "-"

    return tuple((names[key], f"{values[key]:.4f}", gap(key)) for key in names if key in values)


def _sizes(report: Report) -> tuple[tuple[str, ...], ...]:
    totals, recorded = report.totals, report.recorded
    rows = []
    if "file_bytes" in totals:
        rows.append(("files of weights", size(totals["file_bytes"])))
        rows.append(("the same parameters in bfloat16", size(2 * totals["parameters"])))
        rows.append(("bits for each parameter, scales included", f"{totals['bits_per_parameter']:.2f}"))
    if "minutes" in recorded:
        rows.append(("minutes of the run", f"{recorded['minutes']:.1f}"))
    if "peak_memory_bytes" in recorded:
        rows.append(("peak memory of the run", size(recorded["peak_memory_bytes"])))
    if "data" in recorded:
        rows.append(("calibration", str(recorded["data"])))
    return tuple(rows)


def _bits(report: Report) -> tuple[tuple[str, ...], ...]:
    counts: dict[tuple[str, int], list[int]] = {}
    for row in report.rows:
        count = counts.setdefault((row["kind"], row["bits"]), [0, 0])
        count[0] += 1
        count[1] += row["bytes"]
    return tuple((f"{kind}, {bits} bits", str(n), size(b)) for (kind, bits), (n, b) in sorted(counts.items()))


def _worst(report: Report) -> tuple[tuple[str, ...], ...]:
    if report.sites is None:
        return ()
    return tuple(
        (name, str(site["bits"]), f"{site['sqnr_db']:.1f} dB", f"{site['clipped']:.2%}", advice(site))
        for name, site in report.sites.worst(WORST)
    )


def moved_ranges(report: Report) -> list[tuple[str, tuple[float, float], tuple[float, float], float]]:
    """Activations with calibrated and final ends, and the ratio of their widths; what moved most comes first."""
    found = []
    for row in report.rows:
        if row["kind"] == "activation" and row["tensor"] in report.calibrated:
            low, high = report.calibrated[row["tensor"]]
            low, high = min(low, 0.0), max(high, 0.0)
            if high > low:
                ratio = (row["max"] - row["min"]) / (high - low)
                found.append((row["tensor"], (low, high), (row["min"], row["max"]), ratio))
    return sorted(found, key=lambda item: -abs(item[3] - 1))


def _moved(report: Report) -> tuple[tuple[str, ...], ...]:
    def ends(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.4g} to {pair[1]:.4g}"

    return tuple((n, ends(old), ends(new), f"x{ratio:.3f}") for n, old, new, ratio in moved_ranges(report)[:WORST])


def _scales(report: Report) -> tuple[tuple[str, ...], ...]:
    wide = sorted(report.scales.items(), key=lambda item: item[1][0] - item[1][2])
    return tuple((name, *(f"{value:.4g}" for value in values)) for name, values in wide[:WORST])


def _evaluations(report: Report) -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = report.recorded.get("evaluations") or {}
    for name, values in found.items():
        if "scores" in values:
            for task, metrics in values["scores"].items():
                rows += [(task, metric, f"{value:.6g}") for metric, value in metrics.items()]
        elif "perplexity" in values:
            rows.append((name, "perplexity", f"{values['perplexity']:.6g}"))
    return tuple(rows)


def _environment(report: Report) -> tuple[tuple[str, ...], ...]:
    versions = report.recorded.get("versions")
    return tuple((k, str(v)) for k, v in versions.items()) if isinstance(versions, dict) else ()
