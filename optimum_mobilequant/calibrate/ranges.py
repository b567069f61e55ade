"""Choose the static range of each activation from its statistics."""

from __future__ import annotations

import math

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


def choose_ranges(plan: Plan, statistics: Statistics, method: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Low and high end of every activation that is not fixed.

    Args:
        method: ``"minmax"`` (the extremes seen), ``"percentile"`` (0.01 % and 99.99 % of the values) or ``"mse"`` (the
            share of the extremes with the smallest squared rounding error). The last two act on 8-bit tensors; 16-bit
            grids keep the extremes, which cost them nothing.

    Returns:
        quantizer name -> 0-dim float32 (low <= 0, high >= 0).

    Raises:
        ValueError: unknown method.
    """
    if method not in ("minmax", "percentile", "mse"):
        raise ValueError(f'range_init "{method}" is unknown; known: minmax, percentile, mse')
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    for name, spec in plan.activations.items():
        if spec.fixed is not None:
            continue
        low, high = statistics.low[name].clamp(max=0.0), statistics.high[name].clamp(min=0.0)
        if spec.role == "scores":
            # The encoding must reach low enough for a hidden position, added as a saturating negative, to vanish.
            low = low - _MASK_MARGIN[spec.bits]
        elif spec.bits <= 8 and method != "minmax":
            low, high = (
                _percentile(statistics.sample[name])
                if method == "percentile"
                else _least_error(statistics.sample[name], low, high, spec)
            )
        ranges[name] = (low, high)
    return ranges


def _percentile(sample: Tensor) -> tuple[Tensor, Tensor]:
    values, order = sample[0].sort()
    below = sample[1][order].cumsum(0)
    ends = values[torch.searchsorted(below, below[-1] * torch.tensor([1e-4, 1 - 1e-4])).clamp(max=len(values) - 1)]
    return ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)


def _least_error(sample: Tensor, low: Tensor, high: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    values, weights = sample
    best, best_error = (low, high), math.inf
    for share in _SHARES:
        scale, zero_point = affine_qparams(low * share, high * share, spec.grid)
        rounded = dequantize(quantize(values, scale, zero_point, spec.grid), scale, zero_point)
        error = float(((rounded - values).square() * weights).sum())
        if error < best_error:
            best, best_error = (low * share, high * share), error
    return best
