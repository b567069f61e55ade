"""The report as one self-contained HTML page: no script, no font, no image from elsewhere."""

from __future__ import annotations

import html
import re

from . import plots
from .collect import Report
from .markdown import SITES, Table, size, tables_of
from .style import SCRIPT, STYLE

# A browser then asks for nothing, whatever a name in a file may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def to_html(report: Report) -> str:
    """One page, UTF-8. All names and texts from files are escaped."""
    tables = {table.heading: table for table in tables_of(report)}
    parts, headings = [], []
    for heading, extra in (
        ("Result", ""),
        ("Size and cost", ""),
        ("Ladder", plots.ladder(report)),
        ("Stages", ""),
        ("Learning", plots.learning(report)),
        ("Bits", plots.bit_plan(report)),
        ("Error by layer and site", plots.site_errors(report)),
        ("Worst sites", ""),
        ("Distribution", plots.distribution(report)),
        ("Ranges before and after learning", plots.ranges(report)),
        ("Learned parameters", plots.scales(report)),
        ("Evaluations", ""),
        ("Settings", ""),
        ("Environment", ""),
        ("The run again", f"<pre>{html.escape(report.rerun)}</pre>" if report.rerun else ""),
    ):
        body = extra + (_table(tables[heading]) if heading in tables else "")
        if body:
            headings.append(heading)
            parts.append(f'<section><h2 id="{_slug(heading)}">{heading}</h2>{body}</section>')
    title = html.escape(report.title)
    links = " ".join(f'<a href="#{_slug(name)}">{name}</a>' for name in headings)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{_headline(report)}"
        f"<nav>{links}</nav>{''.join(parts)}{_foot(report)}<script>{SCRIPT}</script></body></html>\n"
    )


def _slug(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def _headline(report: Report) -> str:
    values, boxes = report.perplexity, []
    if "quantized" in values:
        if "float" in values:
            boxes.append((f"{values['float']:.3f}", "perplexity of the float model"))
        boxes.append((f"{values['quantized']:.3f}", "perplexity quantized"))
        if "float" in values:
            boxes.append((f"{values['quantized'] / values['float'] - 1:+.2%}", "against the float model"))
    if "file_bytes" in report.totals:
        share = report.totals["file_bytes"] / (2 * report.totals["parameters"])
        boxes.append((size(report.totals["file_bytes"]), f"in files, {share:.0%} of bfloat16"))
    if "minutes" in report.recorded:
        boxes.append((f"{report.recorded['minutes']:.1f}", "minutes"))
    what = ", ".join(str(report.settings[key]) for key in ("preset", "recipe", "effort") if report.settings.get(key))
    cells = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(name)}</div>" for value, name in boxes)
    if report.kind == "run":
        done = report.stages.get("pack") == "finished"
        cells = f"<p>{'All stages are finished' if done else 'This run has not finished'}; what is there is below.</p>"
    return f'<h1>{html.escape(report.title)}</h1><p class="soft">{html.escape(what)}</p><div class="big">{cells}</div>'


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], kind: str) -> str:
        site = f' data-site="{html.escape(cells[0])}"' if kind == "td" and table.heading == SITES else ""
        return f"<tr{site}>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    head = row(table.columns, "th") if any(table.columns) else ""
    kind = ' class="sites"' if table.heading == SITES else ""
    return f'<div class="scroll"><table{kind}>{head}{"".join(row(cells, "td") for cells in table.rows)}</table></div>'


def _foot(report: Report) -> str:
    more = "".join(f"<li>{html.escape(line)}</li>" for line in report.missing)
    parts = [f'<p class="soft">This page can show more:</p><ul class="soft">{more}</ul>'] if more else []
    if report.command:
        parts.append(f'<p class="soft">Made by <code>{html.escape(report.command)}</code>.</p>')
    return "".join(parts)
