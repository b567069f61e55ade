"""Plots as inline SVG. Colours and fonts come from the page's style sheet; every shape names its value on hovering."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

# A plot keeps this width on a phone, too, where it may be scrolled; text in it then stays readable.
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 480, 190, 52, 10, 34, 12

Pair = tuple[float, float]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def escape(text: object) -> str:
    return html.escape(str(text))


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between the ends."""
    raw = (high - low) / count or 1.0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Maps values to places inside the frame of one plot, and draws the frame."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]):
        self.x, self.y = _ends(xs), _ends(ys)

    def across(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - self.y[0]) / (self.y[1] - self.y[0]))

    def frame(self, label: str, below: str, body: str, show: Callable[[float], str] = number) -> str:
        parts = []
        for value in _ticks(*self.y):
            y = self.up(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(value)}</text>')
        for value in _ticks(*self.x, count=6):
            x = self.across(value)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{number(value)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(below)}</text>')
        return _svg(label, WIDTH, HEIGHT, "".join(parts) + body)


def _ends(values: Sequence[float]) -> Pair:
    low, high = min(values), max(values)
    return (low - 0.5, high + 0.5) if low == high else (low, high)


def _svg(label: str, width: float, height: float, body: str, style: str = "") -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}"'
        f"{style}><title>{escape(label)}</title>{body}</svg>"
    )


def lines(label: str, below: str, series: Mapping[str, Sequence[Pair]]) -> str:
    """One curve for each name.

    Args:
        below: what the x axis counts.
    """
    points = [point for curve in series.values() for point in curve]
    axes = _Axes([x for x, _ in points], [y for _, y in points])
    parts = []
    for index, (name, curve) in enumerate(series.items()):
        places = [(axes.across(x), axes.up(y)) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
        parts += [
            f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            f"<title>{escape(name)}, {number(at)}: {value:.6g}</title></circle>"
            for (x, y), (at, value) in zip(places, curve, strict=True)
        ]
    return axes.frame(label, below, "".join(parts)) + (legend(series) if len(series) > 1 else "")


def legend(names: Iterable[str], colours: Sequence[str] = ("s0", "s1")) -> str:
    """What the colours mean."""
    shown = (f'<span class="{colour}">{escape(name)}</span>' for name, colour in zip(names, colours, strict=False))
    return f'<p class="legend">{" ".join(shown)}</p>'


def spread(label: str, below: str, points: Sequence[tuple[float, float, float, float]]) -> str:
    """At each x a bar from the smallest to the largest value, with a dot at the median.

    Args:
        points: x, smallest, median, largest; logarithms to base 2, shown as what they are logarithms of.
    """
    axes = _Axes([p[0] for p in points], [value for p in points for value in p[1:]] + [0.0])

    def show(value: float) -> str:
        return f"{2**value:.3g}"

    parts = [
        f'<line class="bar s0" x1="{axes.across(x):.1f}" x2="{axes.across(x):.1f}" y1="{axes.up(low):.1f}" '
        f'y2="{axes.up(high):.1f}"><title>{number(x)}: {show(low)} to {show(high)}, median {show(middle)}</title>'
        "</line>"
        f'<circle class="dot s1" cx="{axes.across(x):.1f}" cy="{axes.up(middle):.1f}" r="3"/>'
        for x, low, middle, high in points
    ]
    return axes.frame(label, below, "".join(parts), show)


def intervals(label: str, rows: Sequence[tuple[str, Pair, Pair]]) -> str:
    """Each row: a range before (thick, pale) and after (thin, strong), on a scale of its own about a common zero."""
    name_width, tall, width = 220, 22, 480
    parts = [f'<line class="grid" x1="{_zero(name_width, width)}" x2="{_zero(name_width, width)}" y1="0" '
             f'y2="{tall * len(rows)}"/>']  # fmt: skip
    for index, (name, before, after) in enumerate(rows):
        reach = max(abs(end) for pair in (before, after) for end in pair) or 1.0
        half, middle, y = (width - name_width - 12) / 2, _zero(name_width, width), tall * index + tall / 2
        parts.append(f'<text x="{name_width - 6}" y="{y + 4:.0f}" text-anchor="end">{escape(_short(name, 28))}</text>')
        for kind, (low, high) in (("wide", before), ("thin s0", after)):
            start, end = (middle + half * value / reach for value in (low, high))
            parts.append(
                f'<line class="{kind}" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}">'
                f"<title>{escape(name)}: "
                f"{number(before[0])} to {number(before[1])} before, {number(after[0])} to {number(after[1])} after"
                "</title></line>"
            )
    return _svg(label, width, tall * len(rows), "".join(parts)) + legend(
        ["after learning", "as calibrated"], ("s0", "pale")
    )


def _zero(name_width: int, width: int) -> float:
    return name_width + (width - name_width - 12) / 2


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def bars(label: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A bar for each name; a negative value has none. Logarithmic where the largest is 30 times the smallest.

    Args:
        rows: name, value, text behind the bar.
    """
    positive = [value for _, value, _ in rows if value > 0]
    logarithmic = bool(positive) and max(positive) > 30 * min(positive)
    low = math.log10(min(positive)) - 0.3 if logarithmic else 0.0
    high = (math.log10(max(positive)) if logarithmic else max(positive)) if positive else 1.0
    name_width, tall, width = 170, 24, 480
    parts = []
    for index, (name, value, text) in enumerate(rows):
        y = tall * index
        share = ((math.log10(value) if logarithmic else value) - low) / (high - low) if value > 0 else 0.0
        long = max(0.0, share) * (width - name_width - 90)
        parts.append(
            f'<text x="{name_width - 6}" y="{y + 15}" text-anchor="end">{escape(_short(name, 21))}</text>'
            f'<rect class="mark" x="{name_width}" y="{y + 4}" width="{long:.1f}" height="14"/>'
            f'<text x="{name_width + long + 5:.1f}" y="{y + 15}">{escape(text)}</text>'
        )
    note = '<p class="soft">The bars are logarithmic.</p>' if logarithmic else ""
    return _svg(label, width, tall * len(rows), "".join(parts)) + note


def outline(counts: Sequence[float], top: float) -> str:
    """Path of the steps of a histogram on a logarithmic scale, from the left end of the frame to the right."""
    step, base = (WIDTH - LEFT - RIGHT) / len(counts), HEIGHT - BOTTOM
    parts, last = [f"M{LEFT} {base}"], base
    for index, count in enumerate(counts):
        y = round(base - (base - TOP) * math.log10(1 + count) / top)
        if y != last:
            parts.append(f"V{y}")
            last = y
        parts.append(f"H{LEFT + step * (index + 1):.0f}")
    return "".join(parts) + f"V{base}"


def heat_map(
    label: str,
    cells: Mapping[tuple[str, int], float],
    show: Callable[[float], str],
    *,
    strong: str = "low",
    numbers: bool = False,
    select: Mapping[tuple[str, int], str] | None = None,
) -> str:
    """Rows by name, columns by layer.

    Args:
        cells: value at (row, layer). show: the value in words.
        strong: ``"low"`` or ``"high"`` values are drawn strong; ``"far"``: those far from 0, those below it in the
            other colour.
        numbers: write the value into the cell.
        select: what a cell stands for, for the page's script.
    """
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells})
    wide, tall, names = max(15, min(36, 420 // max(len(columns), 1))), 19, 10 + 7.4 * min(34, max(map(len, rows)))
    strength = _strengths(list(cells.values()), strong)
    width, height = names + wide * len(columns) + 8, tall * len(rows) + 36
    parts = []
    for y, row in enumerate(rows):
        parts.append(
            f'<text x="{names - 6:.0f}" y="{tall * y + 14}" text-anchor="end">{escape(_short(row, 34))}</text>'
        )
        for x, column in enumerate(columns):
            if (value := cells.get((row, column))) is None:
                continue
            chosen = f' data-site="{escape(select[row, column])}"' if select else ""
            kind = "cell below" if strong == "far" and value < 0 else "cell"
            parts.append(
                f'<rect class="{kind}" x="{names + wide * x:.0f}" y="{tall * y + 1}" width="{wide - 2}" '
                f'height="{tall - 2}" fill-opacity="{strength(value):.2f}"{chosen}>'
                f"<title>{escape(row)}, layer {column}: {escape(show(value))}</title></rect>"
            )
            if numbers:
                middle, on = names + wide * x + wide / 2 - 1, " on" if strength(value) > 0.5 else ""
                parts.append(
                    f'<text class="in{on}" x="{middle:.0f}" y="{tall * y + 14}" text-anchor="middle">{value:g}</text>'
                )
    step = max(1, -(-len(columns) // 14))
    parts += [
        f'<text x="{names + wide * (x + 0.5) - 1:.0f}" y="{height - 20}" text-anchor="middle">{column}</text>'
        for x, column in enumerate(columns)
        if x % step == 0
    ]
    middle = names + wide * len(columns) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 4}" text-anchor="middle">layer</text>')
    style = f' style="min-width:{0.8 * width:.0f}px;max-width:{1.3 * width:.0f}px"'
    return f'<div class="scroll">{_svg(label, width, height, "".join(parts), style)}</div>'


def _strengths(values: Sequence[float], strong: str) -> Callable[[float], float]:
    low, high = min(values), max(values)
    if strong == "far":
        reach = max(abs(low), abs(high)) or 1.0
        return lambda value: 0.06 + 0.94 * abs(value) / reach
    span = (high - low) or 1.0
    if strong == "low":
        return lambda value: 0.06 + 0.94 * (high - value) / span
    return lambda value: 0.06 + 0.94 * (value - low) / span
