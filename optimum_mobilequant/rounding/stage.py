"""Stage 35 in closed form (33, where learned rounding goes on): GPTQ or Qronos, with transforms and ranges final."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..config.recipes import COMPENSATED
from ..log import get_logger
from ..tune import Learnables, LearnResult
from ..tune.objective import make_objective
from .compensate import Compensation
from .sequential import Method, Rounded, round_layers

if TYPE_CHECKING:
    from ..run.prepare import Prepared

logger = get_logger(__name__)


def compensate_rounding(
    model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared
) -> LearnResult | None:
    """Round the projections of ``student``; a result that validates worse than rounding to nearest is dropped.

    The run directory keeps a snapshot of each finished layer.

    Returns:
        The objective on the validation text before and after, in nats; ``best_step`` is the number of layers, 0 where
        rounding to nearest is kept. None where the settings do not ask for such a rounding.
    """
    if not {job.settings.rounding, job.settings.rounding_start} & set(COMPENSATED):
        return None
    s, weights = job.settings, dict(learnables.projections())
    # Where learned rounding goes on from here, stage 35 is its own.
    name, stage = (s.rounding, "round") if s.rounding in COMPENSATED else (s.rounding_start, "compensate")
    if (kept := job.run.load(stage)) is not None:
        device = next(student.buffers()).device
        for path, parts in _unflatten(kept[0]).items():
            weights[path].fix(**{key: part.to(device) for key, part in parts.items()})
        return LearnResult.from_dict(kept[1])
    started, layers = time.monotonic(), job.plan.geometry.layers
    objective = make_objective(s.objective, job.plan, top_k=s.top_k, teacher_dtype=s.teacher_dtype)

    def validate() -> float:
        device, total = next(student.buffers()).device, 0.0
        for ids in job.data.validation.split(s.batch_size):
            total += float(objective(student, model, ids.to(device))) * len(ids)
        return total / len(job.data.validation)

    before = validate()
    tensors, meta = job.run.load_progress(stage) or ({}, {"layers": 0})
    method = Method(
        correct=name == "qronos",
        compensation=Compensation(s.rounding_damping, s.rounding_act_order, s.rounding_block),
        magr=s.magr,
    )
    rounded = round_layers(
        student,
        job.plan,
        weights,
        job.data.train,
        method,
        batch_size=s.batch_size,
        done=_unflatten(tensors),
        layers_done=int(meta["layers"]),
        snapshot=lambda done, count: job.run.save_progress(stage, _flatten(done), {"layers": count}),
    )
    after = validate()
    result = LearnResult(before, after, layers, time.monotonic() - started, [(0, before), (layers, after)])
    if not after <= before:
        logger.warning(
            f"rounding by {name} does worse on the validation text than rounding to nearest "
            f"({after:.4g} against {before:.4g}), which is kept: give more calibration text (samples), "
            "or raise rounding_damping"
        )
        for weight in weights.values():
            weight.unfix()
        rounded, result.best, result.best_step = {}, before, 0
    job.run.save(stage, _flatten(rounded), vars(result))
    return result


def _flatten(rounded: Rounded) -> dict[str, Tensor]:
    return {f"{name}/{key}": part for name, parts in rounded.items() for key, part in parts.items()}


def _unflatten(tensors: Mapping[str, Tensor]) -> Rounded:
    rounded: Rounded = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        rounded.setdefault(name, {})[key] = tensor
    return rounded
