"""Stages 4 and 10: the prefix that every text finds in its cache, and what activations look like behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn.prefix import prefix_states
from .collect import Statistics, collect
from .prefix import FoundPrefix, find_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..run.prepare import Prepared


def choose_prefix(model: PreTrainedModel, job: Prepared) -> list[tuple[Tensor, Tensor]]:
    """Stage 4: the tokens that every text finds in its cache; their float keys and values, layer by layer."""
    if job.settings.prefix is False:
        return []
    if (kept := job.run.load("prefix")) is not None:
        found = FoundPrefix(tuple(kept[0]["tokens"].tolist()), kept[1])
    else:
        found = find_prefix(model, job.plan, job.data.train, job.settings.prefix, batch_size=job.settings.batch_size)
        job.run.save("prefix", {"tokens": torch.tensor(found.tokens, dtype=torch.int64)}, found.report)
    job.use_prefix(found)
    return prefix_states(model, found.tokens) if found.tokens else []


def calibrate(student: nn.Module, job: Prepared) -> Statistics:
    """Stage 10: what every activation of the float model looks like."""
    if (kept := job.run.load("calibrate")) is not None:
        return Statistics.from_tensors(kept[0])
    statistics = collect(student, job.data.train, batch_size=job.settings.batch_size)
    job.run.save("calibrate", statistics.to_tensors(), {})
    return statistics
