"""The report as Markdown, and the tables that both forms share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .advice import advice
from .collect import Report

WORST = 12
SITES = "Worst sites"
# Roles whose ranges are known beforehand or widened for masked positions, whatever calibration saw.
NEVER_LEARNED = ("rope_table", "probabilities", "scores")


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
        Table("Ladder", ("", "perplexity", "against float", "minutes", "peak memory", "adds"), _ladder(report)),
        Table("Stages", ("stage", "state"), _stages(report)),
        Table("Learning", ("stage", "steps", "loss before", "best", "last"), _learning(report)),
        Table("Bits", ("integers", "tensors", "bytes"), _bits(report)),
        Table(SITES, ("activation", "bits", "SQNR", "clipped", "what to do"), _worst(report)),
        Table("Ranges before and after learning", ("activation", "calibrated", "now", "width"), _moved(report)),
        Table("Learned parameters", ("parameter", "smallest", "median", "largest"), _learned(report)),
        Table("Evaluations", ("what", "score", "value"), _evaluations(report)),
        Table("Settings", ("option", "value"), tuple((k, str(v)) for k, v in report.settings.items())),
        Table("Environment", ("", ""), _environment(report)),
    ]
    return [table for table in found if table.rows]


def to_markdown(report: Report) -> str:
    """One Markdown page."""
    parts = [f"# {report.title}", f"A {report.kind} of optimum-mobilequant."]
    for table in tables_of(report):
        parts += [f"## {table.heading}", _rows(table)]
    if report.rerun:
        parts += ["## The run again", f"```bash\n{report.rerun}\n```"]
    if report.missing:
        parts += ["## This page can show more", "\n".join(f"- {line}" for line in report.missing)]
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


def _stages(report: Report) -> tuple[tuple[str, ...], ...]:
    """Of a finished run those that it had."""
    finished = report.stages.get("pack") == "finished"
    return tuple((stage, state) for stage, state in report.stages.items() if state != "-" or not finished)


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
        rows.append(("minutes of the run", _beside(recorded, "minutes", "minutes_estimate", "{:.1f}".format)))
    if "peak_memory_bytes" in recorded:
        rows.append(
            ("peak memory of the run", _beside(recorded, "peak_memory_bytes", "peak_memory_estimate_bytes", size))
        )
    if "data" in recorded:
        rows.append(("calibration", str(recorded["data"])))
    return tuple(rows)


def _beside(recorded: Mapping[str, Any], measured: str, estimated: str, show: Callable[[float], str]) -> str:
    text = show(recorded[measured])
    return text if recorded.get(estimated) is None else f"{text} (estimated before: {show(recorded[estimated])})"


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
        if row["kind"] == "activation" and row["tensor"] in report.calibrated and row["role"] not in NEVER_LEARNED:
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


_LEARNED = {"transforms": "factor", "clips": "share kept by clipping", "matrices": "matrix"}


def _learned(report: Report) -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    for kind, found in report.learned.items():
        wide = sorted(found.items(), key=lambda item: item[1][0] - item[1][2])
        rows += [(f"{_LEARNED[kind]}, {name}", *(f"{v:.4g}" for v in values)) for name, values in wide[:WORST]]
    return tuple(rows)


def _learning(report: Report) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (stage, str(pairs[-1][0]), f"{pairs[0][1]:.5g}", f"{min(v for _, v in pairs):.5g}", f"{pairs[-1][1]:.5g}")
        for stage, pairs in report.history.items()
    )


def _ladder(report: Report) -> tuple[tuple[str, ...], ...]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    return tuple(
        (
            row["name"],
            cell(row["perplexity"], "{:.4f}") if not row["error"] else f"refused: {row['error']}",
            cell(row["gap"], "{:+.2%}"),
            cell(row["minutes"], "{:.1f}"),
            "-" if row["peak_memory_bytes"] is None else size(row["peak_memory_bytes"]),
            ", ".join(row["added"]) or "-",
        )
        for row in report.ladder
    )


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
    found = [report.recorded.get(name) for name in ("versions", "machine")]
    return tuple((k, str(v)) for values in found if isinstance(values, dict) for k, v in values.items())
