"""Scale, zero point and rounding, defined once.

``q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)`` and ``x_hat = (q - zero_point) * scale``: the rule
of ONNX ``QuantizeLinear`` and of torch, so that a simulated code is the code a runtime computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A range narrower than this holds nothing but zeros; the floor only keeps the scale finite.
SMALLEST_RANGE = 1e-12


@dataclass(frozen=True)
class Grid:
    """The integers a tensor may take.

    Args:
        bits: 2 to 16, or 32 for accumulators.
        signed: two's complement (weights, rotary tables) or unsigned (activations).
    """

    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """Smallest torch integer dtype that stores the codes."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed and self.bits <= 16 else torch.int32


def affine_qparams(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the asymmetric grid over [low, high], widened to hold 0.

    The zero point is rounded here, so that 0.0 is a code and tuning sees the integer that is exported.

    Args:
        low, high: float32, any equal shape.
        grid: the target integers.

    Returns:
        scale float32 (> 0) and zero_point int32, of that shape.
    """
    scale, zero_point = affine_scale_and_offset(low, high, grid.qmin, grid.qmax)
    return scale, zero_point.round().clamp(grid.qmin, grid.qmax).to(torch.int32)


def affine_scale_and_offset(
    low: Tensor, high: Tensor, qmin: int | Tensor, qmax: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and the zero point before it is rounded; bounds may be tensors, one for each range."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low).clamp(min=SMALLEST_RANGE) / (qmax - qmin)
    return scale, qmin - low / scale


def weight_qparams(low: Tensor, high: Tensor, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight range on a signed grid.

    Symmetric: ``scale = max(|low|, |high|) / qmax``, zero point 0, the code ``qmin`` stays usable. Asymmetric: as
    :func:`affine_qparams` (MobileQuant, section 3.2; the range is widened to hold 0).

    Args:
        low, high: float32 ``[units, 1]``, the clipped minimum and maximum of each unit.
    """
    if not symmetric:
        return affine_qparams(low, high, grid)
    scale = torch.maximum(low.abs(), high.abs()).clamp(min=SMALLEST_RANGE) / grid.qmax
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes of ``x`` (float, any shape) on ``grid``; scale and zero point broadcast. Returns ``grid.dtype``."""
    codes = (x.float() / scale).round() + zero_point
    return codes.clamp(grid.qmin, grid.qmax).to(grid.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 values of integer ``codes``; scale and zero point broadcast."""
    return (codes.to(torch.int32) - zero_point).float() * scale
