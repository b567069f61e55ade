"""What to do about a site with a large error: a table of rules, the first that fits counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Site = Mapping[str, Any]


def _wide(site: Site) -> bool:
    seen, ends = site["seen"], site["range"]
    return seen is not None and (ends[1] - ends[0]) > 4 * (seen[1] - seen[0])


RULES: tuple[tuple[Callable[[Site], bool], str], ...] = (
    (
        lambda s: s["clipped"] > 1e-3,
        "values lie outside its range: calibrate on text like this (dataset=, samples=), or set bits to 16 here",
    ),
    (_wide, "its range is several times what this text fills: outliers of the calibration text set it; prefix=True"),
    (
        lambda s: s["bits"] == 8 and s["role"] in ("product", "norm"),
        "one range for all channels: give it 16 bits by overrides, or more tuning (effort=, steps=)",
    ),
    (
        lambda s: s["bits"] == 8,
        "8 bits are few here: give it 16 bits by overrides if the target allows it",
    ),
    (lambda s: True, "16 bits and still the largest error: it is small"),
)


def advice(site: Site) -> str:
    """One line for a measured site."""
    return next(text for applies, text in RULES if applies(site))
