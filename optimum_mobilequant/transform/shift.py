"""The constant that is added to rotated keys, from the calibrated ends of each channel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..calibrate import Statistics
from ..nn.shift import TunableShift
from ..plan import Plan


@torch.no_grad()
def shift_keys(student: nn.Module, statistics: Statistics, plan: Plan) -> Statistics:
    """Give each attention of a student the constant that brings the ends of each key channel to equal distance from 0.

    The middle, not the mean: what a static range has to hold are the ends.

    Args:
        statistics: of the student without it and before any scale; matrices at the keys still are the identity.

    Returns:
        The statistics with the magnitudes that shifted keys have.
    """
    f, g = plan.family, plan.geometry
    path = (f.key_norm or f.key).removeprefix(f"{f.attention}.")
    absmax = dict(statistics.channel_absmax)
    device = next(student.buffers()).device
    for i in range(g.layers):
        name = f.layer(i, f.attention)
        low, high = statistics.channel_ends[f"{name}.key_rotated"].to(device)
        middle = (low + high) / 2
        attention: Any = student.get_submodule(name)
        attention.key_shift = TunableShift(-middle.view(g.kv_heads, g.head_dim), path)
        absmax[f"{name}.key_rotated"] = ((high - low) / 2).cpu()
    return replace(statistics, channel_absmax=absmax)
