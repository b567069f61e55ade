"""The report as one self-contained HTML page: no script, no font, no image from elsewhere."""

from __future__ import annotations

import html

from . import svg
from .collect import Report
from .markdown import Table, moved_ranges, tables_of

# Readable at the width of a phone, in the dark and in print.
STYLE = """
:root { --ink: #1b1f24; --paper: #ffffff; --soft: #6b7480; --rule: #dde2e8; --mark: #0b62c4; --warm: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14171b; --soft: #98a2ae; --rule: #2c333b; --mark: #6cb0ff; --warm: #ff9d5c } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--rule) }
p { margin: .4rem 0 } .soft { color: var(--soft) }
.big { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0 }
.big div { flex: 1 1 9rem; border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem .9rem }
.big b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
svg.plot { width: 100%; height: auto; max-width: 50rem } svg text { fill: var(--soft); font-size: 11px }
.grid { stroke: var(--rule) } .line { fill: none; stroke: var(--mark); stroke-width: 2 } .mark { fill: var(--mark) }
.before { fill: var(--soft) } .after, .cell { fill: var(--mark) } code { overflow-wrap: anywhere }
@media print { body { max-width: none; font-size: 11px } h2 { break-after: avoid } svg, tr { break-inside: avoid } }
"""


def to_html(report: Report) -> str:
    """One page, UTF-8. All names and texts from files are escaped."""
    tables = {table.heading: table for table in tables_of(report)}
    parts = [_headline(report)]
    for heading, extra in (
        ("Result", ""),
        ("Size and cost", ""),
        ("Stages", ""),
        ("Learning", _learning(report)),
        ("Bits", _bit_plan(report)),
        ("Error by layer and site", _heat(report)),
        ("Worst sites", ""),
        ("Distribution", _distribution(report)),
        ("Ranges that moved most", _ranges(report)),
        ("Learned parameters", ""),
        ("Evaluations", ""),
        ("Settings", ""),
        ("Environment", ""),
    ):
        body = (_table(tables[heading]) if heading in tables else "") + extra
        if body:
            parts.append(f"<section><h2>{heading}</h2>{body}</section>")
    if report.command:
        parts.append(f'<p class="soft">Made by <code>{html.escape(report.command)}</code>.</p>')
    title = html.escape(report.title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _headline(report: Report) -> str:
    values, boxes = report.perplexity, []
    if "quantized" in values:
        boxes.append((f"{values['quantized']:.3f}", "perplexity"))
        if "float" in values:
            boxes.append((f"{values['quantized'] / values['float'] - 1:+.2%}", "against the float model"))
    if "bits_per_parameter" in report.totals:
        boxes.append((f"{report.totals['bits_per_parameter']:.2f}", "bits for each parameter"))
    if "minutes" in report.recorded:
        boxes.append((f"{report.recorded['minutes']:.1f}", "minutes"))
    what = ", ".join(str(report.settings[key]) for key in ("preset", "recipe", "effort") if report.settings.get(key))
    cells = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(name)}</div>" for value, name in boxes)
    if not boxes and report.kind == "run":
        cells = "<p>This run has not finished; what is there is below.</p>"
    return f'<h1>{html.escape(report.title)}</h1><p class="soft">{html.escape(what)}</p><div class="big">{cells}</div>'


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    head = row(table.columns, "th") if any(table.columns) else ""
    return f'<div class="scroll"><table>{head}{"".join(row(cells, "td") for cells in table.rows)}</table></div>'


def _learning(report: Report) -> str:
    return "".join(
        f"<p>{html.escape(stage)}: validation loss by step</p>{svg.line_plot(f'validation loss, {stage}', pairs)}"
        for stage, pairs in report.history.items()
        if len(pairs) > 1
    )


def _bit_plan(report: Report) -> str:
    cells: dict[tuple[str, int], float] = {}
    for row in report.rows:
        parts = row["tensor"].split(".layers.")
        if row["kind"] == "weight" and row["role"] != "gain" and len(parts) > 1:
            layer, _, name = parts[1].partition(".")
            cells[name.removesuffix(".weight"), int(layer)] = float(row["bits"])
    if not cells or len(set(cells.values())) == 1:
        return ""
    return "<p>Bits of the weights, fewest strongest:</p>" + svg.heat_map("bits of the weights", cells, "bits")


def _heat(report: Report) -> str:
    if report.sites is None:
        return ""
    cells = {
        (site["role"], site["layer"]): site["sqnr_db"]
        for site in report.sites.sites.values()
        if site["layer"] is not None and site["sqnr_db"] is not None
    }
    if not cells:
        return ""
    read = f"on {report.sites.tokens} tokens, in dB; the strongest is worst."
    note = f"<p>SQNR of each activation's own rounding {read}</p>"
    return note + svg.heat_map("SQNR by site and layer", cells, "dB")


def _distribution(report: Report) -> str:
    if report.sites is None or not report.sites.histogram:
        return ""
    found = report.sites.histogram
    plot = svg.histogram(f"values of {found['name']}", found["edges"], found["before"], found["after"])
    return f"<p><code>{html.escape(found['name'])}</code>: before (grey) and after rounding, logarithmic.</p>{plot}"


def _ranges(report: Report) -> str:
    moved = moved_ranges(report)
    if len(moved) < 2:
        return ""
    points = [(float(i), ratio) for i, (*_, ratio) in enumerate(sorted(moved, key=lambda item: item[3]))]
    return "<p>Width of each range over the calibrated one, sorted:</p>" + svg.line_plot("width of ranges", points)
