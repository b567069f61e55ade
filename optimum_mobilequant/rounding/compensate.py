"""Rounding by second-order compensation: the error of each rounded column is spread over the columns still to come.

GPTQ (Frantar et al. 2023) minimises ``|| X (W - Q)^T ||^2`` with ``H = X^T X``; here X is what the quantized model
feeds the layer. Qronos (Zhang et al. 2025, arXiv 2505.11695) minimises ``|| X W^T - X~ Q^T ||^2``: X comes from the
float model and X~ from the quantized one, so that rounding also corrects what earlier layers and activations lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Grid


@dataclass(frozen=True)
class Compensation:
    """Options of the column-by-column rounding.

    Args:
        damping: share of the Hessian's mean diagonal that is added to its diagonal; a number in (0, 1].
        act_order: round the columns with the largest inputs first.
        block: columns between two updates of all later columns; it changes the speed, not the result.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128


@dataclass(frozen=True)
class InputMoments:
    """Second moments of what a linear reads, float64 ``[in, in]``.

    Args:
        hessian: ``X~^T X~`` of the inputs in the quantized model.
        cross: ``X~^T X``, with the inputs X of the float model; None where these are not compared.
    """

    hessian: Tensor
    cross: Tensor | None = None


def compensate(
    weight: Tensor, moments: InputMoments, scale: Tensor, zero_point: Tensor, grid: Grid, options: Compensation
) -> Tensor:
    """The weight, in steps of its scale, moved so that rounding it to nearest gives the compensated codes.

    Columns that no input ever reaches are rounded to nearest. A row whose error on ``moments`` would end above that of
    rounding to nearest keeps the latter, so no row is ever made worse.

    Args:
        weight: float ``[out, in]``.
        scale: float32, broadcastable to ``[out, in]``. zero_point: int32, as scale.

    Returns:
        float32 ``[out, in]``; codes are ``clamp(round(result) + zero_point)``.

    Raises:
        ValueError: moments that are not finite, or a Hessian that the damping does not make positive definite.
    """
    source, steps = weight.double(), scale.double().expand(weight.shape)
    low, high = ((edge - zero_point).double().expand(weight.shape) for edge in (grid.qmin, grid.qmax))
    order, upper, target, first = _prepare(source, moments, options)
    inverse = torch.argsort(order)
    moved = _columns(
        target[:, order] / steps[:, order],
        None if first is None else first / steps[:, order[0]],
        upper,
        steps[:, order],
        (low[:, order], high[:, order]),
        options.block,
    )[:, inverse]
    nearest = (source / steps).float()

    def error(place: Tensor) -> Tensor:
        return row_errors(source, place.round().double().clamp(low, high) * steps, moments)

    return torch.where((error(moved) <= error(nearest))[:, None], moved, nearest)


def _prepare(
    source: Tensor, moments: InputMoments, options: Compensation
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Order of the columns, the upper Cholesky factor of the inverse Hessian in that order, the weight from which
    rounding starts, and what the first column is rounded from if that is not the start."""
    hessian = moments.hessian.clone()
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        raise ValueError("the inputs of a layer are not finite on the calibration text: check the model's weights")
    dead = diagonal <= 0
    extra = options.damping * diagonal.mean().clamp(min=1e-30)
    hessian.diagonal().add_(torch.where(dead, diagonal.mean().clamp(min=1e-30), extra))
    order = torch.arange(len(hessian), device=hessian.device)
    if options.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order]
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        upper = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the Hessian of a layer's inputs is not positive definite with damping {options.damping}: raise "
            f"rounding_damping, or give more calibration text ({error})"
        ) from error
    if moments.cross is None:
        return order, upper, source, None
    # Damping pulls towards the weight as it is; without it, a direction that no input takes would be set to 0.
    cross = moments.cross.clone()
    cross.diagonal().add_(hessian.diagonal() - moments.hessian.diagonal())
    pulled = source @ cross.T
    target = torch.linalg.solve(hessian, pulled.T).T
    j = order[0]
    first = source[:, j] + (pulled[:, j] - source @ hessian[j]) / hessian[j, j]
    return order, upper, target, first


def _columns(
    places: Tensor, first: Tensor | None, upper: Tensor, steps: Tensor, bounds: tuple[Tensor, Tensor], block: int
) -> Tensor:
    """Round column after column, in the order given, and return what each was rounded from, float32 ``[out, in]``.

    Args:
        places: float64 ``[out, in]``, in steps. first: what column 0 is rounded from, or None.
        upper: of :func:`_prepare`. steps: real size of a step. bounds: lowest and highest step.
    """
    real, out = places * steps, torch.empty_like(places, dtype=torch.float32)
    for start in range(0, real.shape[1], block):
        end = min(start + block, real.shape[1])
        errors = torch.empty_like(real[:, start:end])
        for j in range(start, end):
            # Rounded from float32, which is what is stored: a tie must fall the same way twice.
            out[:, j] = first if j == 0 and first is not None else real[:, j] / steps[:, j]
            rounded = out[:, j].round().double().clamp(bounds[0][:, j], bounds[1][:, j]) * steps[:, j]
            error = (real[:, j] - rounded) / upper[j, j]
            real[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
            errors[:, j - start] = error
        real[:, end:] -= errors @ upper[start:end, end:]
    return out


def row_errors(weight: Tensor, rounded: Tensor, moments: InputMoments) -> Tensor:
    """Squared output error of each row on the calibration data, float64 ``[out]``, up to a constant of the row when
    ``moments`` compare with the float model.

    Args:
        weight, rounded: float64 ``[out, in]``.
    """
    if moments.cross is None:
        difference = rounded - weight
        return ((difference @ moments.hessian) * difference).sum(1)
    return ((rounded @ moments.hessian) * rounded).sum(1) - 2 * ((weight @ moments.cross.T) * rounded).sum(1)
