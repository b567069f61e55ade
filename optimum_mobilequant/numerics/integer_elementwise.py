"""Integer operations on single elements: residual sums, the rotation of pairs, functions as tables."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .integer import LARGEST_MULTIPLIER, Multiplier, rounding_shift
from .qparams import Grid, dequantize, quantize


def shared_multipliers(first: float, second: float) -> tuple[int, int, int]:
    """Two real factors as mantissas of up to 31 bits over one shift, for a sum that is rounded once."""
    larger = Multiplier.of(max(first, second))
    shift = int(larger.shift)
    return round(min(first, LARGEST_MULTIPLIER) * 2**shift), round(min(second, LARGEST_MULTIPLIER) * 2**shift), shift


def rescaled_sum(a: Tensor, b: Tensor, multipliers: tuple[int, int, int]) -> Tensor:
    """``a * first + b * second`` rounded once; int64 of magnitude up to 2**17, as :func:`shared_multipliers` gave."""
    first, second, shift = multipliers
    return rounding_shift(a * first + b * second, shift)


def shift_step(bits: int) -> float:
    """Step of a constant that is added behind a rotation, in steps of the rotated tensor, which has 8 or 16 bits.

    A rotated value is at most sqrt(2) 2**bits steps from 0, so 16-bit codes of this step hold any of them.
    """
    return 2.0 ** (bits - 14)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    """Rotary embedding on Q1.14 tables: int64, values times 2**14. A shift's codes in these units are
    ``codes << bits of x`` (:func:`shift_step`).

    Args:
        x: int64 ``[..., head_dim]``, centred. cos, sin: int64 ``[..., dims / 2]``.
        dims: the first ``dims`` rotate in pairs ``(i, i + dims / 2)``, the others pass.
    """
    half = dims // 2
    low, high = x[..., :half], x[..., half:dims]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, x[..., dims:] << 14], dim=-1)


def lookup_table(
    function: Callable[[Tensor], Tensor], scale: Tensor, zero_point: int, grid: Grid, out: tuple[Tensor, int, Grid]
) -> Tensor:
    """Codes of ``function`` at every code of a grid: ``[2**bits]``, in the output grid's dtype.

    Args:
        function: float32 -> float32, elementwise. scale: float32, 0-dim. out: (scale, zero point, grid) of the result.
    """
    codes = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int32)
    values = function(dequantize(codes, scale, torch.tensor(zero_point, dtype=torch.int32)))
    return quantize(values, out[0], torch.tensor(out[1], dtype=torch.int32), out[2])


def look_up(codes: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """Entries of a :func:`lookup_table` at ``codes`` of ``grid``."""
    return table[codes.to(torch.int64) - grid.qmin]
