"""Who gets more bits: greedy along the convex hull of each unit's choices.

Upgrades are taken in the order of loss saved for each byte, and the first that does not fit ends it. On the hull this
order is optimal for every budget at which it ends exactly (the Lagrangian of the multiple-choice knapsack, Shoham and
Gersho 1988), and a larger budget only goes further along it: it never takes bits away from a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .budget import Unit

Losses = Mapping[str, Mapping[int, float]]


def allocate(units: Sequence[Unit], losses: Losses, choices: Sequence[int], limit: float, kind: str) -> dict[str, int]:
    """Bits for each unit, by name.

    Args:
        units: what gets bits.
        losses: unit -> bits -> expected loss; only differences within a unit and their ratios between units count.
        choices: bits that a unit may have.
        limit: what all units may cost together. kind: of the budget, see :meth:`Unit.cost`.

    Raises:
        ValueError: not even the fewest bits everywhere fit.
    """
    least = smallest(units, choices, kind)
    if least > limit:
        raise ValueError(f"{limit:.0f} is less than the smallest cost {least}")
    chosen = dict.fromkeys((unit.name for unit in units), min(choices))
    spent = least
    upgrades = []
    for order, unit in enumerate(units):
        for before, after, rate in _hull(unit, losses[unit.name], choices, kind):
            upgrades.append((-rate, order, after, unit.name, unit.cost(after, kind) - unit.cost(before, kind)))
    for _, _, bits, name, price in sorted(upgrades):
        if spent + price > limit:
            break
        chosen[name], spent = bits, spent + price
    return chosen


def smallest(units: Sequence[Unit], choices: Sequence[int], kind: str) -> int:
    """Cost of the fewest bits everywhere."""
    return total(units, dict.fromkeys((unit.name for unit in units), min(choices)), kind)


def total(units: Sequence[Unit], bits: Mapping[str, int], kind: str) -> int:
    """Cost of an allocation."""
    return sum(unit.cost(bits[unit.name], kind) for unit in units)


def _hull(unit: Unit, losses: Mapping[int, float], choices: Sequence[int], kind: str) -> list[tuple[int, int, float]]:
    """Upgrades (from, to, loss saved for each unit of cost) from the fewest bits on, of falling rate."""
    at, left = min(choices), sorted(choices)
    steps: list[tuple[int, int, float]] = []
    while True:
        left = [bits for bits in left if bits > at and losses[bits] < losses[at]]
        if not left:
            return steps
        rates = {b: (losses[at] - losses[b]) / (unit.cost(b, kind) - unit.cost(at, kind)) for b in left}
        best = max(left, key=lambda bits: (rates[bits], bits))
        steps.append((at, best, rates[best]))
        at = best
