"""Choose the static range of each activation from its statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import affine_qparams, dequantize, quantize
from ..plan import ActivationSpec, Plan
from .collect import Statistics

# Room below the lowest score, in nats, for the code of a hidden position: exp(-24) is 0 in 32-bit fixed point, even
# times a thousand hidden positions. 8-bit scores are masked on a 16-bit grid of the same steps and need none.
_MASK_MARGIN = {8: 0.0, 16: 24.0}
# Shares of the observed range tried by the error search.
_SHARES = torch.linspace(0.2, 1.0, 41)
# Then of each end by itself.
_FACTORS = torch.linspace(0.5, 2.0, 31)


def choose_ranges(
    plan: Plan, statistics: Statistics, method: str, *, norm: float = 2.4
) -> dict[str, tuple[Tensor, Tensor]]:
    """Low and high end of every activation that is not fixed.

    Args:
        method: ``"minmax"`` (the extremes seen), ``"percentile"`` (0.01 % and 99.99 % of the values), ``"mse"`` (the
            share of the extremes with the smallest squared rounding error) or ``"lp"`` (the smallest sum of
            ``|error|^norm``, each end by itself). All but the first act on 8-bit tensors; 16-bit grids keep the
            extremes, which cost them nothing.
        norm: of ``"lp"``; above 2 clipping costs more against rounding (2.4: LAPQ, Nahshan et al. 2021, and AIMET's
            and Brevitas' searches use such norms).

    Returns:
        quantizer name -> 0-dim float32 (low <= 0, high >= 0).

    Raises:
        ValueError: unknown method.
    """
    if method not in ("minmax", "percentile", "mse", "lp"):
        raise ValueError(f'range_init "{method}" is unknown; known: minmax, percentile, mse, lp')
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    for name, spec in plan.activations.items():
        if spec.fixed is not None:
            continue
        low, high = statistics.low[name].clamp(max=0.0), statistics.high[name].clamp(min=0.0)
        if spec.role == "scores":
            # The encoding must reach low enough for a hidden position, added as a saturating negative, to vanish.
            low = low - _MASK_MARGIN[spec.bits]
        elif spec.bits <= 8 and method != "minmax":
            sample = statistics.sample[name]
            if method == "percentile":
                low, high = _percentile(sample)
            else:
                low, high = _least_error(sample, low, high, spec, norm if method == "lp" else 2.0)
                if method == "lp":
                    low, high = _each_end(sample, low, high, spec, norm)
        ranges[name] = (low, high)
    return ranges


def _percentile(sample: Tensor) -> tuple[Tensor, Tensor]:
    values, order = sample[0].sort()
    below = sample[1][order].cumsum(0)
    ends = values[torch.searchsorted(below, below[-1] * torch.tensor([1e-4, 1 - 1e-4])).clamp(max=len(values) - 1)]
    return ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)


def _error_of(sample: Tensor, low: Tensor, high: Tensor, spec: ActivationSpec, norm: float) -> float:
    values, weights = sample
    scale, zero_point = affine_qparams(low, high, spec.grid)
    error = (dequantize(quantize(values, scale, zero_point, spec.grid), scale, zero_point) - values).abs()
    return float((error.pow(norm) * weights).sum())


def _least_error(
    sample: Tensor, low: Tensor, high: Tensor, spec: ActivationSpec, norm: float
) -> tuple[Tensor, Tensor]:
    candidates = [(low * share, high * share) for share in _SHARES]
    return min(candidates, key=lambda ends: _error_of(sample, ends[0], ends[1], spec, norm))


def _each_end(sample: Tensor, low: Tensor, high: Tensor, spec: ActivationSpec, norm: float) -> tuple[Tensor, Tensor]:
    """One end after the other, within the values seen."""
    values = sample[0]
    least, most = values.min().clamp(max=0.0), values.max().clamp(min=0.0)
    lows = [low, *((low * f).clamp(min=least) for f in _FACTORS)]
    low = min(lows, key=lambda end: _error_of(sample, end, high, spec, norm))
    highs = [high, *((high * f).clamp(max=most) for f in _FACTORS)]
    return low, min(highs, key=lambda end: _error_of(sample, low, end, spec, norm))
