"""MagR: smaller weights that compute almost the same, so that the grid can be finer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ITERATIONS = 100
STRENGTH = 1e-3


def project_l1(rows: Tensor, radius: Tensor) -> Tensor:
    """Nearest point of each row in the l1 ball (Duchi et al. 2008): soft thresholding at the level that fits.

    Args:
        rows: ``[n, columns]``. radius: ``[n]``, above 0.
    """
    size = rows.abs()
    ranked = size.sort(dim=1, descending=True).values
    excess = ranked.cumsum(1) - radius[:, None]
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = (ranked * count > excess).sum(1, keepdim=True).clamp(min=1)
    level = (excess.gather(1, last - 1) / last).clamp(min=0)
    return rows.sign() * (size - level).clamp(min=0)


def shrink_maximum(rows: Tensor, amount: Tensor) -> Tensor:
    """Proximal operator of ``amount * max|row|``: the row minus its projection on the l1 ball (Moreau)."""
    return rows - project_l1(rows, amount)


def reduce_magnitude(weight: Tensor, hessian: Tensor, strength: float = STRENGTH) -> Tensor:
    """Minimise ``1/2 || X (W - W')^T ||^2 + a max|w'|`` for each row by proximal gradient steps (MagR, Zhang et al.
    2024, arXiv 2406.00800), accelerated (FISTA, Beck and Teboulle 2009).

    ``a = strength * |H w|_1`` for each row w: at strength 1 the minimum is at 0, so one strength serves all layers.

    Args:
        weight: float64 ``[out, in]``. hessian: float64 ``[in, in]``.
        strength: 0 changes nothing.

    Returns:
        float64 ``[out, in]``; a row that the steps have not made smaller is left as it is.
    """
    top = torch.linalg.eigvalsh(hessian)[-1]
    if top <= 0 or strength == 0:
        return weight
    normal = hessian / top
    amount = strength * (weight @ normal).abs().sum(1).clamp(min=1e-30)
    reduced, point, pace = weight, weight, 1.0
    for _ in range(_ITERATIONS):
        before, reduced = reduced, shrink_maximum(point - (point - weight) @ normal, amount)
        quicker = (1 + math.sqrt(1 + 4 * pace * pace)) / 2
        point, pace = reduced + (pace - 1) / quicker * (reduced - before), quicker
    smaller = reduced.abs().amax(1) < weight.abs().amax(1)
    return torch.where(smaller[:, None], reduced, weight)
