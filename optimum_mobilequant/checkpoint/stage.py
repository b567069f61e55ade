"""Stage 40: integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .pack import Packed, pack

if TYPE_CHECKING:
    from ..run.prepare import Prepared


def fold_and_round(student: nn.Module, job: Prepared) -> Packed:
    """Fold what was tuned into the weights and round them, or take what the run's folder holds."""
    if (kept := job.run.load("pack")) is not None:
        return Packed.from_tensors(kept[0])
    packed = pack(student, job.plan)
    job.run.save("pack", packed.to_tensors(), {})
    return packed
