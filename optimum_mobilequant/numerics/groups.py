"""Weights with a scale for each group of columns, in two levels that stay integers.

A row has one float scale, each group of its columns a whole multiplier m in 1 ... 16: ``w = scale * (m * q)`` with q
on the 4-bit grid. ``m * q`` is an 8-bit code, so a kernel or a chip that multiplies 8-bit weights with one scale a row
computes these weights exactly. QQQ (Zhang et al. 2024) has the same two levels with a float16 group scale and rounds
the product; QNN's low-power block quantization has whole multipliers, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .qparams import Grid, weight_qparams

MAX_MULTIPLIER = 16  # 16 * -8 is the lowest 8-bit code


def groups_of(columns: int, size: int) -> int:
    """Number of groups; the last may be shorter."""
    return -(-columns // size)


def group_units(matrix: Tensor, size: int) -> Tensor:
    """``[out, in]`` as ``[out * groups, size]``, the last group of a row filled up with zeros."""
    missing = groups_of(matrix.shape[1], size) * size - matrix.shape[1]
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(-1, size)


def spread(per_group: Tensor, size: int, columns: int) -> Tensor:
    """``[out, groups]`` as ``[out, columns]``: each group's value for all its columns."""
    return per_group.repeat_interleave(size, dim=1)[:, :columns]


def two_levels(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Row scales float32 ``[out, 1]`` and multipliers uint8 ``[out, groups]`` nearest to group scales ``scale``."""
    row = scale.amax(1, keepdim=True) / MAX_MULTIPLIER
    return row, (scale / row).round().clamp(1, MAX_MULTIPLIER).to(torch.uint8)


def fake_quantize_groups(matrix: Tensor, share: Tensor | None, grid: Grid, size: int) -> Tensor:
    """Round to two-level groups, with straight-through gradients to the matrix and to the share of each range kept.

    The gradient takes a multiplier for the number it was rounded from.

    Args:
        matrix: float32 ``[out, in]``.
        share: in (0, 1), ``[out * groups, 1]``, or None for the full range.
    """
    units = group_units(matrix, size)
    high = units.abs().amax(1, keepdim=True)
    if share is not None:
        high = high * share
    scale, _ = weight_qparams(-high, high, grid, symmetric=True)
    with torch.no_grad():
        row, multiplier = two_levels(scale.view(len(matrix), -1))
        step = (row * multiplier).view(-1, 1)
    step = scale + (step - scale).detach()
    place = units / step
    codes = place + (place.round() - place).detach()
    return (codes.clamp(grid.qmin, grid.qmax) * step).view(len(matrix), -1)[:, : matrix.shape[1]]
