"""What becomes of the sums of a tile, inside the kernels: correction, bias, requantization, the store.

Requantization is :func:`~...numerics.integer.requantize`, operation by operation in the same integers, so that codes
are equal bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Kinds of output; the values are passed to the kernels as constants.
TOTALS, REAL, CODES, ON_GRID = 0, 1, 2, 3


@triton.jit
def rounding_shift(value, shift):
    """int64 ``value / 2**shift`` to nearest, ties to even; ``shift`` int64 from 1 to 62."""
    half = (tl.zeros_like(shift) + 1) << (shift - 1)
    return (value + (half - 1) + ((value >> shift) & 1)) >> shift


@triton.jit
def requantize_wide(total, mantissa, shift):
    """int64 totals up to 2**43: the product with a 31-bit mantissa in two parts, as numerics forms it."""
    low = (total & 8191) * mantissa
    kept = (total >> 13) * mantissa + (low >> 13)
    inexact = ((low & 8191) != 0).to(tl.int64)
    return rounding_shift((kept << 1) | inexact, shift - 12)


@triton.jit
def to_output(total, multiplier, shift, zero_point, qmax, scale, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Totals (int32, or int64 if WIDE) ``[channels, rows]`` as the kind of output asked for.

    Args:
        multiplier: float32 ``[channels, 1]`` for REAL, the int32 mantissas otherwise. shift: int32, their shifts.
    """
    if KIND == 0:
        value = total
    elif KIND == 1:
        value = total.to(tl.float32) * multiplier
    else:
        if WIDE:
            steps = requantize_wide(total, multiplier.to(tl.int64), shift.to(tl.int64))
        else:
            steps = rounding_shift(total.to(tl.int64) * multiplier.to(tl.int64), shift.to(tl.int64))
        codes = tl.minimum(tl.maximum(steps + zero_point, 0), qmax)
        if KIND == 2:
            value = codes
        else:
            value = (codes - zero_point).to(tl.float32) * scale
    return value
