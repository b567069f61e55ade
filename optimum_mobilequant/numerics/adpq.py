"""AdpQ: outliers found by the adaptive LASSO, without data (Ghaffari et al. 2024).

The adaptive LASSO ``min 1/2 |W - V|^2 + lambda sum |v_i| / |w_i|^gamma`` has a closed form; for gamma = 1 it keeps
exactly the elements with ``w^2 > lambda``. Those are the outliers. Here lambda is a quantile of ``w^2`` in each row:
every row has the same number of them, and the tensors have a shape that is known before the weights are.

As storage: outliers in 8 bits with their column, the core in 3 or 4 bits with a step and a low end for each group of
columns, whose ranges the outliers no longer stretch. As a start of clipping: the rest of the row's range is cut off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .affine import group_codes, group_values
from .qparams import SMALLEST_RANGE

# Shares of outliers that the clipping start tries; 0 is the full range.
CLIP_SHARES = (0.0, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1)
# Power of the error it minimises: between the squared error and the fourth power, which guards large weights more.
CLIP_POWER = 2.4
_OUTLIER_MAX = 127


def outlier_count(columns: int, share: float) -> int:
    """Outliers of a row: ``share`` of its columns, rounded up."""
    return math.ceil(share * columns)


def outlier_mask(weight: Tensor, share: float) -> Tensor:
    """bool ``[out, in]``, exactly :func:`outlier_count` in each row: the elements with ``w^2 > lambda``."""
    count = outlier_count(weight.shape[1], share)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    return mask.scatter_(1, weight.abs().topk(count, dim=1).indices, True) if count else mask


def column_dtype(columns: int) -> torch.dtype:
    """Of stored column numbers."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


def adpq_split(
    weight: Tensor, bits: int, group: int, share: float, *, search: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Core and outliers of a matrix; there is no data to give.

    Args:
        weight: float32 ``[out, in]``. bits: of the core. group: columns that share a range. share: of outliers.

    Returns:
        core codes uint8 ``[out, in]``, step and low float32 ``[out, groups]``; outliers: columns int16 or int32
        ``[out, k]`` in rising order, codes int8 ``[out, k]``, scale float32 ``[out, 1]``.
    """
    mask = outlier_mask(weight, share)
    codes, step, low = group_codes(weight, bits, group, left_out=mask, search=search)
    count = outlier_count(weight.shape[1], share)
    columns = mask.nonzero()[:, 1].view(len(weight), count)
    values = weight.gather(1, columns)
    largest = values.abs().amax(1, keepdim=True) if count else weight.new_zeros(len(weight), 1)
    scale = largest.clamp(min=SMALLEST_RANGE) / _OUTLIER_MAX
    found = (values / scale).round().clamp(-_OUTLIER_MAX, _OUTLIER_MAX).to(torch.int8)
    return codes, step, low, columns.to(column_dtype(weight.shape[1])), found, scale


def adpq_merge(
    codes: Tensor, step: Tensor, low: Tensor, columns: Tensor, outliers: Tensor, scale: Tensor, group: int
) -> Tensor:
    """float32 ``[..., in]``: the core with the outliers in place. Inverse of :func:`adpq_split` up to rounding."""
    core = group_values(codes, step, low, group)
    return core.scatter(-1, columns.to(torch.int64), outliers.float() * scale)


def row_quantile(weight: Tensor, share: float) -> Tensor:
    """sqrt(lambda) ``[units, 1]``: the largest magnitude of each row that is no outlier at this share."""
    count = outlier_count(weight.shape[1], share)
    return weight.abs().topk(min(count + 1, weight.shape[1]), dim=1).values[:, -1:]
