"""Three kinds of plots as inline SVG. Colours and fonts come from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 64, 28, 12


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    return [low + (high - low) * i / count for i in range(count + 1)]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _frame(label: str, low: float, high: float, body: str, bottom: str) -> str:
    lines = []
    for value in _ticks(low, high):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / ((high - low) or 1))
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f"<title>{html.escape(label)}</title>{''.join(lines)}{body}{bottom}</svg>"
    )


def line_plot(label: str, points: Sequence[tuple[float, float]]) -> str:
    """A curve; x and y of each point."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high, span = min(ys), max(ys), (max(xs) - min(xs)) or 1
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - 8) * (x - min(xs)) / span
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / (high - low))

    placed = [place(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    marks = "".join(
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{_number(p[0])}: {p[1]:.6g}</title></circle>'
        for (x, y), p in zip(placed, points, strict=True)
    )
    bottom = "".join(
        f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_number(x)}</text>'
        for x, anchor in ((min(xs), "start"), (max(xs), "end"))
    )
    return _frame(label, low, high, f'<polyline class="line" points="{path}"/>{marks}', bottom)


def histogram(label: str, edges: Sequence[float], before: Sequence[float], after: Sequence[float]) -> str:
    """Two distributions over the same bins, on a logarithmic scale."""
    top = math.log10(1 + max([*before, *after, 1.0]))
    step = (WIDTH - LEFT - 8) / len(before)
    bars = []
    for index, pair in enumerate(zip(before, after, strict=True)):
        for kind, count in zip(("before", "after"), pair, strict=True):
            tall = (HEIGHT - TOP - BOTTOM) * math.log10(1 + count) / top
            x = LEFT + step * index + (step / 2 if kind == "after" else 0)
            bars.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{step / 2:.2f}" '
                f'height="{tall:.1f}"><title>{_number(edges[index])}: {count:.0f}</title></rect>'
            )
    bottom = "".join(
        f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_number(edges[i])}</text>'
        for x, anchor, i in ((LEFT, "start", 0), (WIDTH - 8, "end", -1))
    )
    return _frame(f"{label}, log10(1 + count)", 0.0, top, "".join(bars), bottom)


def heat_map(label: str, cells: Mapping[tuple[str, int], float], unit: str) -> str:
    """Rows by name, columns by layer. Low values are drawn strong: they are what one looks for."""
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells})
    wide = max(14, min(40, 520 // max(len(columns), 1)))
    low, high = min(cells.values()), max(cells.values())
    width, height = 150 + wide * len(columns) + 8, 20 * len(rows) + 24
    parts = []
    for y, row in enumerate(rows):
        parts.append(f'<text x="144" y="{20 * y + 15}" text-anchor="end">{html.escape(row)}</text>')
        for x, column in enumerate(columns):
            if (value := cells.get((row, column))) is None:
                continue
            strength = 1 - (value - low) / ((high - low) or 1)
            parts.append(
                f'<rect class="cell" x="{150 + wide * x}" y="{20 * y + 2}" width="{wide - 2}" height="17" '
                f'fill-opacity="{0.08 + 0.92 * strength:.2f}"><title>{html.escape(row)}, layer {column}: '
                f"{value:.1f} {unit}</title></rect>"
            )
    step = max(1, len(columns) // 12)
    for x, column in enumerate(columns):
        if x % step == 0:
            parts.append(
                f'<text x="{150 + wide * x + wide / 2}" y="{height - 6}" text-anchor="middle">{column}</text>'
            )
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" style="max-width: {1.25 * width:.0f}px" role="img" '
        f'aria-label="{html.escape(label)}">'
        f"<title>{html.escape(label)}</title>{''.join(parts)}</svg>"
    )
