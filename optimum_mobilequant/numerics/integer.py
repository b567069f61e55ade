"""Integer arithmetic of the executor: requantization and exact matrix products. Nothing here computes in floats.

A real factor ``M`` becomes ``M0 * 2**-shift`` with a 31-bit ``M0``; a result is the product rounded to nearest, ties
to even: the tie rule of ONNX ``QuantizeLinear`` and of :func:`~.qparams.quantize`. (Form of the multiplier: Jacob et
al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section
2.2; their rule for ties differs.) Multipliers are prepared from float64 before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .qparams import Grid

MANTISSA_BITS = 31
# An accumulator of int64 dtype may reach this; the product with a mantissa is then formed in two parts.
WIDEST_ACCUMULATOR = 2**43
_LOW_BITS = 13
# The largest multiplier. On grids of up to 16 bits any accumulator but 0 saturates from there on.
LARGEST_MULTIPLIER = 2.0**17


@dataclass(frozen=True)
class Multiplier:
    """``mantissa * 2**-shift``.

    Args:
        mantissa: int64, 0-dim or ``[channels]``, magnitude below 2**31.
        shift: int64, same shape, from 13 to 62.
    """

    mantissa: Tensor
    shift: Tensor

    @classmethod
    def of(cls, real: Tensor | float) -> Multiplier:
        """Nearest multiplier to ``real`` (any float, 0-dim or ``[channels]``), relative error at most 2**-31.

        Beyond +-2**17 it is +-2**17; below 2**-32 bits are lost, and the absolute error is at most 2**-63.

        Raises:
            ValueError: ``real`` is not finite.
        """
        real = torch.as_tensor(real, dtype=torch.float64)
        if not torch.isfinite(real).all():
            raise ValueError("a requantization multiplier is not finite; a scale is 0, infinite or NaN")
        fraction, exponent = torch.frexp(real.clamp(-LARGEST_MULTIPLIER, LARGEST_MULTIPLIER))
        shift = (MANTISSA_BITS - exponent).clamp(max=62)
        lost = (MANTISSA_BITS - exponent) - shift
        mantissa = torch.ldexp(fraction, MANTISSA_BITS - lost).round().to(torch.int64)
        carry = mantissa.abs() == 2**MANTISSA_BITS
        return cls(torch.where(carry, mantissa // 2, mantissa), (shift - carry.to(shift.dtype)).to(torch.int64))


def rounding_shift(value: Tensor, shift: Tensor | int) -> Tensor:
    """``value / 2**shift`` to the nearest integer, ties to even.

    Args:
        value: int64, magnitude below 2**62. shift: from 1 to 62; a tensor broadcasts.
    """
    half = torch.ones((), dtype=torch.int64) << (torch.as_tensor(shift, dtype=torch.int64) - 1)
    return (value + (half - 1) + ((value >> shift) & 1)) >> shift


def rounding_divide(value: Tensor, divisor: Tensor) -> Tensor:
    """``value / divisor`` to the nearest integer, ties to even; int64, ``divisor`` > 0 and below 2**62."""
    quotient = torch.div(value, divisor, rounding_mode="floor")
    twice = (value - quotient * divisor) * 2
    return quotient + ((twice > divisor) | ((twice == divisor) & ((quotient & 1) == 1))).to(torch.int64)


def requantize(accumulator: Tensor, multiplier: Multiplier) -> Tensor:
    """``accumulator * multiplier`` rounded once, ties to even, as int64. A channel is an index of the last axis.

    Args:
        accumulator: int32 (any value), or int64 of magnitude below 2**43.
    """
    if accumulator.dtype == torch.int32:
        return rounding_shift(accumulator.to(torch.int64) * multiplier.mantissa, multiplier.shift)
    # 43 + 31 bits do not fit: the low part's product is shifted out first, and one bit remembers whether it was exact.
    low = (accumulator & (2**_LOW_BITS - 1)) * multiplier.mantissa
    kept = (accumulator >> _LOW_BITS) * multiplier.mantissa + (low >> _LOW_BITS)
    inexact = (low & (2**_LOW_BITS - 1)) != 0
    return rounding_shift((kept << 1) | inexact.to(torch.int64), multiplier.shift - (_LOW_BITS - 1))


def to_grid(steps: Tensor, zero_point: int, grid: Grid) -> Tensor:
    """Codes ``clamp(steps + zero_point)`` in the grid's dtype."""
    return (steps + zero_point).clamp(grid.qmin, grid.qmax).to(grid.dtype)


def centred(codes: Tensor, zero_point: int) -> Tensor:
    """``codes - zero_point`` as int64."""
    return codes.to(torch.int64) - zero_point


# Matrix products ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A matrix ``codes - zero_point`` as int8 planes: ``sum(weight * plane) + offset``.

    8-bit matrix units multiply bytes; a 16-bit operand takes two of them.

    Args:
        planes: (weight 1 or 256, int8 tensor) pairs. offset: int64, 0-dim, or one for each output channel.
        bound: largest magnitude of an element.
    """

    planes: tuple[tuple[int, Tensor], ...]
    offset: Tensor
    bound: int
    _totals: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, codes: Tensor, zero_point: Tensor | int, grid: Grid) -> Operand:
        """Split ``codes`` on ``grid`` (at most 16 bits); a vector of zero points belongs to the last axis.

        Raises:
            ValueError: a grid of more than 16 bits.
        """
        if grid.bits > 16:
            raise ValueError(f"a matrix product takes operands of up to 16 bits, not {grid.bits}")
        zero = torch.as_tensor(zero_point, dtype=torch.int64)
        bound = max(int((zero - grid.qmin).max()), int((grid.qmax - zero).max()))
        start = 0 if grid.signed else 128  # what brings the top byte to [-128, 127]
        if grid.bits <= 8:
            return cls(((1, _int8(codes, start)),), start - zero, bound)
        wide = codes.to(torch.int32)
        planes = ((256, _int8(wide >> 8, start)), (1, _int8(wide & 0xFF, 128)))
        return cls(planes, 256 * start + 128 - zero, bound)

    def total(self, axis: int) -> Tensor:
        """Sum of the planes (without offset) along an axis, int64; kept, since weights are asked again and again."""
        if axis not in self._totals:
            sums = [weight * plane.sum(axis, dtype=torch.int64) for weight, plane in self.planes]
            self._totals[axis] = sums[0] if len(sums) == 1 else sums[0] + sums[1]
        return self._totals[axis]


def _int8(codes: Tensor, subtract: int) -> Tensor:
    return codes if subtract == 0 and codes.dtype == torch.int8 else (codes.to(torch.int16) - subtract).to(torch.int8)


def accumulator_dtype(bound: int) -> torch.dtype:
    """int32 if sums of magnitude ``bound`` fit, else int64.

    Raises:
        ValueError: a bound that even the wide accumulator does not hold.
    """
    if bound >= WIDEST_ACCUMULATOR:
        raise ValueError(
            f"an accumulator could reach {bound}, beyond 43 bits: the layer is too wide for 16-bit inputs"
        )
    return torch.int32 if bound < 2**31 else torch.int64


def integer_matmul(a: Operand, b: Operand, *, bias: Tensor | None = None) -> Tensor:
    """Exact ``a @ b + bias`` over the codes less their zero points.

    Args:
        a: ``[..., m, k]`` with a 0-dim offset. b: ``[k, n]``, or ``[..., k, n]`` with the leading axes of ``a``.
        bias: int64 ``[n]``, magnitude at most 2**31; or None.

    Returns:
        ``[..., m, n]``: int32 where no sum of ``k`` products and the bias can leave it, else int64.
    """
    length = a.planes[0][1].shape[-1]
    dtype = accumulator_dtype(length * a.bound * b.bound + (0 if bias is None else int(bias.abs().max())))
    out: Tensor | None = None
    for weight_a, plane_a in a.planes:
        for weight_b, plane_b in b.planes:
            part = byte_matmul(plane_a, plane_b).to(torch.int64)
            part = part if weight_a * weight_b == 1 else part * (weight_a * weight_b)
            out = part if out is None else out.add_(part)
    assert out is not None
    # (A + ca)(B + cb) = AB + ca * colsum(B) + cb * (rowsum(A) + k * ca)
    out += a.offset * b.total(-2).unsqueeze(-2)
    if bool((b.offset != 0).any()):
        out += b.offset * (a.total(-1) + length * a.offset).unsqueeze(-1)
    if bias is not None:
        out += bias
    return out.to(dtype)


def byte_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of int8 ``[..., m, k]`` and ``[k, n]`` or ``[..., k, n]``: int32 up to k = 131071, else int64."""
    length = a.shape[-1]
    # Length 1: the fast kernel misreads a transposed [n, 1] matrix, whose strides are those of a contiguous one.
    if length == 1 or length >= 2**17 or not _fast_product_is_exact():
        wide = torch.int32 if length < 2**17 else torch.int64
        return torch.matmul(a.to(wide), b.to(wide))
    if b.ndim == 2:
        return torch._int_mm(a.reshape(-1, length), b).view(*a.shape[:-1], b.shape[-1])
    flat_a, flat_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    products = [torch._int_mm(x, y) for x, y in zip(flat_a, flat_b, strict=True)]
    return torch.stack(products).view(*a.shape[:-1], b.shape[-1])


@cache
def _fast_product_is_exact() -> bool:
    """Some 8-bit kernels add pairs of products in 16 bits and saturate; the extremes show it."""
    extremes = torch.tensor([-128, 127, 127, -128], dtype=torch.int8).repeat(48)
    a, b = extremes.repeat(32, 1), extremes.repeat(32, 1)
    a[1::2], b[::3] = -128, 127
    try:
        found = torch._int_mm(a, b.t())
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, torch.matmul(a.to(torch.int32), b.t().to(torch.int32)))
