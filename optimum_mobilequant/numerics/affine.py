"""Affine rounding with a float step and a float low end for each group of columns: weight storage, no integer graph.

``w_hat = low + step * code``, code in 0 ... 2^bits - 1: round to nearest on the exact range of the group. Unlike the
grids of ``qparams``, zero need not be a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .qparams import SMALLEST_RANGE


def group_count(columns: int, group: int) -> int:
    """Groups of a row; the last may be shorter."""
    return -(-columns // group)


def group_codes(
    weight: Tensor, bits: int, group: int, *, left_out: Tensor | None = None, search: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group of ``group`` columns on its own range.

    Args:
        weight: float32 ``[out, in]``.
        left_out: bool ``[out, in]``, elements that the range need not hold; their codes are clipped.
        search: narrow each range towards its middle where that lowers the squared error, out of 0.5 ... 1 of it.

    Returns:
        codes uint8 ``[out, in]``, step and low float32 ``[out, groups]``.
    """
    values = _grouped(weight, group)
    kept = torch.ones_like(values, dtype=torch.bool) if left_out is None else ~_grouped(left_out, group)
    low = values.where(kept, torch.inf).amin(-1, keepdim=True)
    high = values.where(kept, -torch.inf).amax(-1, keepdim=True)
    empty = low > high  # a group of outliers alone
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    middle, half = (low + high) / 2, (high - low) / 2
    best = _round(values, low, (high - low).clamp(min=SMALLEST_RANGE) / (2**bits - 1), bits)
    if search:
        kept = kept & (torch.arange(kept[0].numel(), device=kept.device) < weight.shape[1]).view(kept.shape[1:])
        error = _error(values, *best, kept)
        for share in torch.linspace(0.98, 0.5, 25).tolist():
            step = (2 * half * share).clamp(min=SMALLEST_RANGE) / (2**bits - 1)
            found = _round(values, middle - half * share, step, bits)
            better = (now := _error(values, *found, kept)) < error
            error = torch.where(better, now, error)
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    codes, step, low = best
    flat = codes.flatten(1)[:, : weight.shape[1]]
    return flat.to(torch.uint8).contiguous(), step.squeeze(-1), low.squeeze(-1)


def group_values(codes: Tensor, step: Tensor, low: Tensor, group: int) -> Tensor:
    """float32 values of codes: ``low + step * code``, shapes as of :func:`group_codes`."""
    columns = codes.shape[-1]
    spread = [t.repeat_interleave(group, dim=-1)[..., :columns] for t in (step, low)]
    return codes.float() * spread[0] + spread[1]


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """``[out, groups, group]``; the last group is filled up with its last element, which moves no end of a range."""
    columns = matrix.shape[1]
    index = torch.arange(group_count(columns, group) * group, device=matrix.device).clamp(max=columns - 1)
    return matrix[:, index].view(len(matrix), -1, group)


def _round(values: Tensor, low: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    return ((values - low) / step).round().clamp(0, 2**bits - 1), step, low


def _error(values: Tensor, codes: Tensor, step: Tensor, low: Tensor, kept: Tensor) -> Tensor:
    return ((codes * step + low - values).square() * kept).sum(-1, keepdim=True)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two columns in a byte: uint8 ``[out, in]`` below 16 -> uint8 ``[out, ceil(in / 2)]``.

    Column 2j is the low nibble of byte j, column 2j + 1 the high one; an odd last column leaves the high nibble 0.
    """
    packed = codes[:, 0::2].clone()
    high = codes[:, 1::2]
    packed[:, : high.shape[1]] |= high << 4
    return packed


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_nibbles`; leading dimensions may be any."""
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2)[..., :columns]
