"""The plots of the page, each from what the report holds; "" where that is nothing."""

from __future__ import annotations

import json
import math
from statistics import median
from typing import Any

from . import svg
from .collect import Report
from .markdown import moved_ranges
from .svg import escape

SHOWN_RANGES = 16
# Distributions that the page carries, the worst sites first: 1.3 kB each, so that the page stays below 3 MB.
MOST_HISTOGRAMS = 1200


def split_name(name: str) -> tuple[str, int] | None:
    """``model.layers.3.mlp.down_proj.input`` -> its name within the layer, and the layer; None outside the layers."""
    _, found, rest = name.partition(".layers.")
    layer, _, inner = rest.partition(".")
    return (inner.removesuffix(".weight"), int(layer)) if found and layer.isdecimal() else None


def learning(report: Report) -> str:
    """A loss curve for each stage that has one."""
    shown = [
        f"<div><p>{escape(stage)}: loss on the validation text, from {pairs[0][1]:.4g} to "
        f"{min(loss for _, loss in pairs):.4g} at best</p>"
        f"{svg.lines(f'validation loss of the stage {stage}', 'step', {stage: pairs})}</div>"
        for stage, pairs in report.history.items()
        if len(pairs) > 1
    ]
    return f'<div class="plots">{"".join(shown)}</div>' if shown else ""


def ladder(report: Report) -> str:
    """Gap of each rung to the float model."""
    rows = [
        (row["name"], 100 * row["gap"], f"{row['gap']:+.2%}")
        for row in report.ladder
        if row["gap"] is not None and row["name"].split()[-1] != "float"
    ]
    if not rows:
        return ""
    return "<p>Perplexity above the float model:</p>" + svg.bars("gap of each rung to the float model", rows)


def bit_plan(report: Report) -> str:
    """Bits of every projection, layer by layer."""
    cells: dict[tuple[str, int], float] = {}
    for row in report.rows:
        if row["kind"] == "weight" and row["role"] != "gain" and (found := split_name(row["tensor"])):
            cells[found] = float(row["bits"])
    if not cells:
        return ""
    if len(kinds := set(cells.values())) == 1:
        return f"<p>Every projection of every layer has {kinds.pop():g} bits.</p>"
    note = "<p>Bits of the weights, fewest strongest:</p>"
    return note + svg.heat_map("bits of the weights", cells, lambda bits: f"{bits:g} bits", numbers=True)


def site_errors(report: Report) -> str:
    """SQNR and clipping by layer, and by layer and site."""
    if report.sites is None:
        return ""
    sqnr: dict[tuple[str, int], float] = {}
    clipped: dict[tuple[str, int], float] = {}
    names: dict[tuple[str, int], str] = {}
    for name, site in report.sites.sites.items():
        if (found := split_name(name)) is None or site["sqnr_db"] is None:
            continue
        sqnr[found], clipped[found], names[found] = site["sqnr_db"], site["clipped"], name
    if not sqnr:
        return ""
    layers = sorted({layer for _, layer in sqnr})
    of_layer = {i: [value for (_, layer), value in sqnr.items() if layer == i] for i in layers}
    curves = {
        "median of the layer's activations": [(i, median(of_layer[i])) for i in layers],
        "worst of them": [(i, min(of_layer[i])) for i in layers],
    }
    parts = [
        f"<p>Signal over the noise of each activation's own rounding (SQNR), on {report.sites.tokens} tokens, in dB: "
        "6 dB less are one bit less.</p>",
        svg.lines("SQNR by layer", "layer", curves) if len(layers) > 1 else "",
        "<p>SQNR by activation, the lowest strongest; choose one to see its distribution:</p>",
        svg.heat_map("SQNR by site and layer", sqnr, lambda value: f"{value:.1f} dB", select=names),
    ]
    if any(clipped.values()):
        least = min(value for value in clipped.values() if value)
        logs = {place: math.log10(max(value, least / 2)) for place, value in clipped.items()}
        parts += [
            "<p>Share of the values that lie outside the range, the largest strongest (logarithmic):</p>",
            svg.heat_map(
                "clipped share by site and layer",
                logs,
                lambda value: f"{10**value:.2g}" if value >= math.log10(least) - 1e-9 else "0",
                strong="high",
                select=names,
            ),
        ]
    else:
        parts.append("<p>No value of this text lies outside its range.</p>")
    return "".join(parts)


def ranges(report: Report) -> str:
    """Ranges of activations before and after learning."""
    moved = moved_ranges(report)
    if not moved:
        return ""

    def short(name: str) -> str:
        found = split_name(name)
        return name if found is None else f"{found[1]} {found[0]}"

    rows = [(short(name), before, after) for name, before, after, _ in moved[:SHOWN_RANGES]]
    parts = [
        "<p>Those that moved most; each on a scale of its own, the line in the middle is zero:</p>",
        svg.intervals("ranges before and after learning", rows),
    ]
    logs = {place: math.log2(ratio) for name, *_, ratio in moved if (place := split_name(name)) and ratio > 0}
    if len(logs) > 1:
        parts += [
            "<p>Width of each range over the calibrated one; wider in blue, narrower in orange:</p>",
            svg.heat_map("width of ranges", logs, lambda value: f"x{2**value:.3f}", strong="far"),
        ]
    return "".join(parts)


def scales(report: Report) -> str:
    """Factors of the learned transforms, and what clipping keeps, by layer."""
    parts = []
    for kind, title in (
        ("transforms", "factors of {0}: smallest, median, largest channel"),
        ("clips", "{0}: share of each row's range that clipping keeps"),
    ):
        groups: dict[str, list[tuple[float, float, float, float]]] = {}
        for name, values in report.learned.get(kind, {}).items():
            if (found := split_name(name)) and min(values) > 0:
                low, middle, high = (math.log2(value) for value in values)
                groups.setdefault(found[0], []).append((float(found[1]), low, middle, high))
        parts += [
            f"<div><p>{escape(title.format(name))}</p>{svg.spread(title.format(name), 'layer', sorted(points))}</div>"
            for name, points in groups.items()
        ]
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def distribution(report: Report) -> str:
    """One distribution, and all others as data for the page's script."""
    sites = report.sites
    if sites is None or sites.chosen is None:
        return ""
    worst = [name for name, _ in sites.worst(MOST_HISTOGRAMS)]
    carried = dict.fromkeys([sites.chosen, *worst])
    shown = {name: _drawn(report, name) for name in sites.histograms if name in carried}
    first = shown[sites.chosen]
    groups: dict[str, list[str]] = {}
    for name in shown:
        found = split_name(name)
        groups.setdefault(f"layer {found[1]}" if found else "outside the layers", []).append(name)

    def chosen(name: str) -> str:
        return " selected" if name == sites.chosen else ""

    options = "".join(
        f'<optgroup label="{escape(group)}">'
        + "".join(f"<option{chosen(name)}>{escape(name)}</option>" for name in names)
        + "</optgroup>"
        for group, names in groups.items()
    )
    left, right, top, bottom = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.TOP, svg.HEIGHT - svg.BOTTOM
    ends = "".join(
        f'<line class="{kind}" data-end="{index}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
        for index, (kind, x) in enumerate(zip(("end old", "end old", "end", "end"), first["ends"], strict=True))
    )
    plot = (
        f'<svg class="plot" id="shape" viewBox="0 0 {svg.WIDTH} {svg.HEIGHT}" role="img" '
        f'aria-label="distribution of the chosen activation"><path class="before" d="{first["before"]}"/>'
        f'<path class="line s0" d="{first["after"]}"/>{ends}'
        f'<line class="grid" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="{left}" y="{bottom + 14}" data-text="low">{first["low"]}</text>'
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end" data-text="high">{first["high"]}</text>'
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end" data-text="top">{first["top"]}</text>'
        f'<text x="{(left + right) / 2}" y="{svg.HEIGHT - 4}" text-anchor="middle">'
        "value (the count is logarithmic)</text>"
        "</svg>"
    )
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    left_out = len(sites.histograms) - len(shown)
    return (
        f'<p><label>Activation <select id="site">{options}</select></label></p>'
        '<p class="legend"><span class="pale">before rounding</span> <span class="s0">after it</span> '
        '<span class="s1">ends of its range</span>'
        + (' <span class="pale">(dashed: as calibrated)</span>' if report.calibrated else "")
        + f'</p>{plot}<p class="soft" id="facts">{escape(first["facts"])}</p>'
        + (f'<p class="soft">{left_out} activations with smaller errors are left out.</p>' if left_out else "")
        + f'<script type="application/json" id="distributions">{data}</script>'
    )


def _drawn(report: Report, name: str) -> dict[str, Any]:
    assert report.sites is not None
    found, site = report.sites.histograms[name], report.sites.sites[name]
    most = max([*found["before"], *found["after"], 1])
    top = math.log10(1 + most)

    def across(value: float) -> float:
        """Outside the frame for what there is not."""
        share = (value - found["low"]) / ((found["high"] - found["low"]) or 1.0)
        return round(svg.LEFT + (svg.WIDTH - svg.LEFT - svg.RIGHT) * share) if -0.01 <= share <= 1.01 else -9

    calibrated = report.calibrated.get(name)
    old = [across(end) for end in calibrated] if calibrated else [-9, -9]
    sqnr = "nothing is rounded" if site["sqnr_db"] is None else f"SQNR {site['sqnr_db']:.1f} dB"
    seen = "nothing seen" if site["seen"] is None else "seen {:.4g} to {:.4g}".format(*site["seen"])
    facts = f"{site['bits']} bits, {sqnr}, {site['clipped']:.2%} clipped; {seen}, range {site['range'][0]:.4g} to "
    return {
        "before": svg.outline(found["before"], top),
        "after": svg.outline(found["after"], top),
        "ends": [*old, *(across(end) for end in site["range"])],
        "low": svg.number(found["low"]),
        "high": svg.number(found["high"]),
        "top": f"{most:,}",
        "facts": facts + f"{site['range'][1]:.4g}",
    }
