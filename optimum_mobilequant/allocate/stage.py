"""Stage 5 of a run with ``bits="auto:..."``: measure, choose, and write the choice down as overrides."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..log import get_logger, progress_bar
from ..plan import build_plan
from .budget import Unit, limit_of, parse_budget, units_of
from .sensitivity import MEASURES
from .solve import allocate, smallest, total

if TYPE_CHECKING:
    from ..run.prepare import Prepared

logger = get_logger(__name__)

DEFAULT_CHOICES = (4, 8)
DEFAULT_MEASURE = "hessian"  # the best at equal bytes, see docs/bits.md


def allocate_bits(job: Prepared) -> None:
    """Give ``job`` a plan with the bits that its budget allows. Without ``bits`` in the config nothing happens.

    The config then holds the choice as ordinary ``overrides`` and no ``bits``: what is saved does not depend on how it
    was chosen. ``recorded["allocation"]`` tells how. Sensitivities and the limit are kept in the run directory.

    Raises:
        ValueError: a budget that is too small (states the smallest possible); overrides of the same bits; choices that
            the target refuses.
    """
    config = job.config
    if config.bits is None:
        return
    choices = sorted(config.bit_choices or DEFAULT_CHOICES)
    name = config.sensitivity or DEFAULT_MEASURE
    measure, budget = MEASURES[name], parse_budget(config.bits)
    units = units_of(job.model, job.plan, choices, by_layer=measure.by_layer)
    kept = job.run.load("allocate")
    if kept is None:
        _refuse_contradictions(job, units, choices)
        limit, rest = limit_of(budget, job.model, job.plan, units)
        refuse_too_small(units, choices, limit, rest, budget.kind)
        losses = _measure(job, name, units, choices)
        job.run.save("allocate", {"losses": losses}, {"limit": limit, "rest": rest})
    else:  # free memory may be another one by now
        losses, limit, rest = kept[0]["losses"], kept[1]["limit"], kept[1]["rest"]
    table = {unit.name: dict(zip(choices, row, strict=True)) for unit, row in zip(units, losses.tolist(), strict=True)}
    chosen = allocate(units, table, choices, limit, budget.kind)
    weights = sum(unit.weights for unit in units)
    mean = sum(unit.weights * chosen[unit.name] for unit in units) / weights
    spent = total(units, chosen, "bytes")
    job.recorded["allocation"] = {
        "bits": config.bits,
        "sensitivity": name,
        "choices": choices,
        "mean_bits": mean,
        "projection_bytes": spent,
        "other_bytes": rest or None,
        "chosen": chosen,
        "losses": {unit: list(row.values()) for unit, row in table.items()},
    }
    config.overrides = {**(config.overrides or {}), **rows_of(job, units, chosen)} or None
    config.bits = config.sensitivity = config.bit_choices = None
    plan = job.plan
    job.plan = build_plan(
        plan.family,
        plan.geometry,
        config.resolve_scheme(),
        config.overrides,
        plan.prefix,
        key_shift=plan.key_shift,
    )
    logger.info(f"{mean:.2f} bits for each weight of the projections on average, {spent:,} bytes, by {name}")


def rows_of(job: Prepared, units: Sequence[Unit], chosen: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Overrides for the units whose bits are not the preset's: a decoder layer is a pattern, a projection a name."""
    rows = {}
    for unit in units:
        if any(job.plan.weights[path].rule.bits != chosen[unit.name] for path in unit.paths):
            pattern = unit.name if unit.paths == (unit.name,) else f"{unit.name}.*"
            # A row of the user's own for the same name goes on to hold.
            rows[pattern] = {**(job.config.overrides or {}).get(pattern, {}), "weight_bits": chosen[unit.name]}
    return rows


def refuse_too_small(units: Sequence[Unit], choices: Sequence[int], limit: float, rest: int, kind: str) -> None:
    """Raise ValueError, with the smallest budget that can be met, if ``limit`` is below it."""
    least = smallest(units, choices, kind)
    if least <= limit:
        return
    if kind == "bits":
        raise ValueError(
            f"the budget cannot be met: the fewest of bit_choices={list(choices)} is {min(choices)}, so the smallest "
            f'is "auto:{min(choices)}"'
        )
    place = "this device has" if kind == "device" else "the budget allows"
    raise ValueError(
        f"the budget cannot be met: {place} {max(0, round(limit + rest)):,} bytes, the smallest model with "
        f'bit_choices={list(choices)} takes {least + rest:,} bytes ("auto:{least + rest}B"), of which {rest:,} are '
        "table, head, norms and encodings; allow fewer bits, or a larger budget"
    )


def _refuse_contradictions(job: Prepared, units: Sequence[Unit], choices: Sequence[int]) -> None:
    paths = [path for unit in units for path in unit.paths]
    for pattern, change in (job.config.overrides or {}).items():
        if "weight_bits" in change and any(fnmatch(path, pattern) for path in paths):
            raise ValueError(
                f'overrides["{pattern}"] fixes the weight bits of projections that bits="{job.config.bits}" is to '
                "choose; leave one of the two out"
            )
    if job.config.target is None:
        return
    from ..exporters.targets import TARGETS, check_plan

    for bits in choices:
        rows = dict(job.config.overrides or {}) | dict.fromkeys(paths, {"weight_bits": bits})
        plan = build_plan(job.plan.family, job.plan.geometry, job.config.resolve_scheme(), rows)
        try:
            check_plan(job.model, plan, TARGETS[job.config.target])
        except ValueError as error:
            raise ValueError(f"bit_choices has {bits} bits, which the target refuses. {error}") from error


def _measure(job: Prepared, name: str, units: Sequence[Unit], choices: Sequence[int]) -> Tensor:
    """Losses ``[units, choices]``, mean over the sequences; a snapshot is kept after each batch."""
    measure = MEASURES[name]
    losses_of = measure.make(job.model, job.plan, units, choices, job.settings.seed)
    sequences = job.data.train[: measure.sequences]
    size = measure.batch or job.settings.batch_size
    done, losses = 0, torch.zeros(len(units), len(choices), dtype=torch.float64)
    if (progress := job.run.load_progress("allocate")) is not None:
        done, losses = progress[1]["done"], progress[0]["losses"]
    bar = progress_bar(range(done, len(sequences), size), f"sensitivity ({name})", unit="batch", leave=True)
    for first in bar:
        losses = losses + losses_of(sequences[first : first + size], first)
        job.run.save_progress("allocate", {"losses": losses}, {"done": first + size})
    if not torch.isfinite(losses).all():
        raise FloatingPointError(f"the {name} sensitivity is not finite; check model and calibration text")
    return losses / len(sequences)
