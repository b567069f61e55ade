"""Integer normalization and softmax: the two operations that reduce a row and divide by the result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .integer import Multiplier, requantize, rounding_divide, rounding_shift

# A normalized value carries 30 fraction bits: |x / rms| <= sqrt(n), so 2**43 holds rows of up to 2**26.
_NORMAL_BITS = 30
# n * sum(x^2) - sum(x)^2 stays below 2**62 up to this width for 17-bit differences of codes.
_WIDEST_NORM = 2**14
# A LayerNorm's bias is stored in 2**-15 steps of the output; what it is added to keeps 12 bits more.
_BIAS_BITS = 15
_SUM_BITS = _BIAS_BITS + 12
EXP_BITS = 30


def integer_sqrt(value: Tensor) -> Tensor:
    """Nearest integer to the square root of int64 ``value`` in [2**60, 2**62); exact (Newton's iteration)."""
    root = torch.full_like(value, 2**31)
    for _ in range(6):  # from at most twice the root, the relative error goes 1, 1/4, 1/40, 3e-4, 5e-8, 1e-15
        root = (root + torch.div(value, root, rounding_mode="floor")) >> 1
    root = root - (root * root > value).to(torch.int64)
    return root + (value - root * root > root).to(torch.int64)


def bit_length(value: Tensor) -> Tensor:
    """Number of bits of positive int64 ``value``; 0 for 0."""
    length = torch.zeros_like(value)
    for step in (32, 16, 8, 4, 2, 1):
        big = value >= 2**step
        length += big * step
        value = torch.where(big, value >> step, value)
    return length + value  # 0 or 1 is left


@dataclass(frozen=True)
class NormConstants:
    """What an integer RMSNorm or LayerNorm needs beside its input.

    Args:
        width: n, elements of a row. centre: subtract the mean.
        fraction: even; the row's sum of squares is kept times ``2**fraction`` (negative: that many bits are dropped).
        epsilon: ``n**2 * eps / scale**2 * 2**fraction``, rounded.
        gain: real gain / output scale, times ``2**-30``, and times ``2**27`` where there is a bias; ``[n]``.
        bias: int64 ``[n]`` in 2**-27 steps of the output, or None.
    """

    width: int
    centre: bool
    fraction: int
    epsilon: int
    gain: Multiplier
    bias: Tensor | None

    @classmethod
    def of(
        cls, gain: Tensor, *, in_scale: float, in_bound: int, out_scale: float, eps: float, centre: bool,
        bias: Tensor | None = None,
    ) -> NormConstants:  # fmt: skip
        """Prepare a norm.

        Args:
            gain: real values, ``[n]``. in_bound: largest magnitude of an input code less its zero point.
            bias: int32 codes ``[n]`` of scale ``out_scale * 2**-15``, or None.

        Raises:
            ValueError: rows wider than int64 holds, or an input that is nothing beside eps.
        """
        width = gain.numel()
        if width > _WIDEST_NORM:
            raise ValueError(f"a norm over {width} elements does not fit 64-bit sums; the widest is {_WIDEST_NORM}")
        offset = width**2 * eps / in_scale**2
        # Rows are kept below 2**60: one more doubling, of odd lengths, stays below 2**62.
        room = 60 - math.ceil(math.log2(width**2 * in_bound**2 + offset))
        fraction = 2 * math.floor(min(room, 60) / 2)
        if fraction < -60:
            raise ValueError(f"the input of a norm has scale {in_scale:.3g}, too small beside eps {eps:.3g}")
        factor = 2.0 ** ((0 if bias is None else _SUM_BITS) - _NORMAL_BITS)
        return cls(
            width, centre, fraction, round(offset * 2.0**fraction),
            Multiplier.of(gain.to(torch.float64) * factor / out_scale),
            None if bias is None else bias.to(torch.int64) << (_SUM_BITS - _BIAS_BITS),
        )  # fmt: skip


def normalise(x: Tensor, constants: NormConstants) -> Tensor:
    """``gain * (x - mean) / sqrt(variance + eps) + bias`` in steps of the output, int64.

    With ``c = n x - sum(x)`` and ``W = n sum(x^2) - sum(x)^2 + n^2 eps / scale^2`` (for RMSNorm without the two
    ``sum(x)``) the normalized value is ``c / sqrt(W)``: the scale of the input cancels everywhere but in eps. ``W`` is
    brought to [2**60, 2**62), its root and the root's reciprocal to 31 bits; the gain and the output's scale are one
    multiplier.

    Args:
        x: int64 ``[..., n]``, codes less their zero point.
    """
    k = constants
    numerator, spread = x * k.width, (x * x).sum(-1, keepdim=True) * k.width
    if k.centre:
        total = x.sum(-1, keepdim=True)
        numerator, spread = numerator - total, spread - total * total
    spread = spread << k.fraction if k.fraction >= 0 else rounding_shift(spread, -k.fraction)
    spread = (spread + k.epsilon).clamp(min=1)
    lift = (62 - bit_length(spread)) >> 1
    root = integer_sqrt(spread << (2 * lift))
    reciprocal = rounding_divide(torch.full_like(root, 2**61), root)
    # A row that is all 0 without eps has no bits to shift; its numerators are 0.
    shift = (61 - _NORMAL_BITS - k.fraction // 2 - lift).clamp(min=1)
    normal = rounding_shift(numerator * reciprocal, shift)
    out = requantize(normal, k.gain)
    return out if k.bias is None else rounding_shift(out + k.bias, _SUM_BITS)


@dataclass(frozen=True)
class ExpTables:
    """``exp(-d * scale)`` for ``d`` from 0 to 65535 in two tables of 256: ``high[d >> 8] * low[d & 255]``, Q30."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, scale: float) -> ExpTables:
        """Tables for codes of step ``scale`` nats."""
        steps = torch.arange(256, dtype=torch.float64) * scale

        def table(distance: Tensor) -> Tensor:
            return (torch.exp(-distance) * 2**EXP_BITS).round().to(torch.int64)

        return cls(table(256 * steps), table(steps))

    def __call__(self, distance: Tensor) -> Tensor:
        """int64 Q30 of int64 distances; 0 from 24 nats on."""
        return rounding_shift(self.high[distance >> 8] * self.low[distance & 255], EXP_BITS)


def integer_softmax(codes: Tensor, exp: ExpTables, qmax: int) -> Tensor:
    """Probabilities as multiples of ``1 / qmax``, int64, each rounded to nearest, ties to even.

    Args:
        codes: ``[..., n]`` unsigned, at most 16 bits, n below 2**32; any zero point, since only distances count.
    """
    wide = codes.to(torch.int64)
    weights = exp(wide.amax(-1, keepdim=True) - wide)
    return rounding_divide(weights * qmax, weights.sum(-1, keepdim=True))
