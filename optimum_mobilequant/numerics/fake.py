"""Fake quantization: the values of quantize-then-dequantize, with straight-through gradients.

Each function is a single autograd node. Written with elementary operations the same arithmetic needs five nodes and
keeps five tensors for the backward pass; here the backward recomputes the clipping mask from the input. On a CPU with
a compiler each direction is one walk through memory (:mod:`..kernels.tuning`), with the same values.

Gradients (method of LSQ+, Bhalgat et al. 2020, for scale and zero point; MobileQuant section 3.2 for their use), with
``inside`` the mask of unclipped elements and ``x_hat`` the output::

    d x          = g * inside
    d scale      = sum(g * (x_hat - inside * x)) / scale
    d zero_point = -scale * sum(g * (1 - inside))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .qparams import Grid
from .recompute import follows_from

if TYPE_CHECKING:
    from ..kernels.tuning import Codes, Passes


def snap(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """``x`` rounded to the grid, without gradients. Arguments as :func:`fake_quantize`."""
    return _snap_steps(torch.div(x, scale), scale, zero_point, grid)


def snap_(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Round ``x`` to the grid in place, without gradients; returns it. Arguments as :func:`fake_quantize`."""
    return _snap_steps(x.div_(scale), scale, zero_point.to(scale.dtype), grid)


def _snap_steps(steps: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    # clamp(round(x/s) + z) - z == clamp(round(x/s), qmin - z, qmax - z): integers, so exact, and one pass less.
    codes = steps.round_()
    if _on_cpu(zero_point):  # scalar bounds vectorise; reading them costs nothing where there is no stream to wait for
        zero = int(zero_point)
        return codes.clamp_(grid.qmin - zero, grid.qmax - zero).mul_(scale)
    return codes.clamp_(grid.qmin - zero_point, grid.qmax - zero_point).mul_(scale)


def _on_cpu(zero_point: Tensor) -> bool:
    return zero_point.ndim == 0 and zero_point.device.type == "cpu" and not torch.compiler.is_compiling()


def ends_of(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The half-steps beyond the outermost codes: what lies outside is clipped."""
    return (grid.qmin - 0.5 - zero_point) * scale, (grid.qmax + 0.5 - zero_point) * scale


def inside_only(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """``grad`` where ``x`` is not clipped, else 0. An element is clipped when it lies beyond the half-step around the
    outermost codes."""
    low, high = ends_of(scale, zero_point, grid)
    if _on_cpu(zero_point):
        return torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
    return torch.where((x > low) & (x < high), grad, 0.0)


def codes_of(scale: Tensor, zero_point: Tensor, grid: Grid) -> Codes:
    """A grid as the compiled passes take it."""
    zero = int(zero_point)
    return float(scale), float(grid.qmin - zero), float(grid.qmax - zero)


def compiled_passes(x: Tensor, scale: Tensor) -> Passes | None:
    """The compiled passes where they can take ``x``: plain float32 without gaps, on a CPU, with one scale."""
    plain = x.is_cpu and scale.is_cpu and x.dtype == torch.float32 and not scale.ndim
    if not plain or type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return None
    if not x.is_contiguous() and torch.empty_like(x).stride() != x.stride():
        return None
    from ..kernels.tuning import passes  # the kernels need numerics themselves

    return passes()


def _snapped(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, tuple[Passes, Codes] | None]:
    """The rounded tensor, marked as following from ``x``; and the compiled passes, if they made it, with the grid as
    they take it."""
    scale, zero_point = scale.detach(), zero_point.detach()
    if (compiled := compiled_passes(x, scale)) is None:
        return follows_from(snap(x, scale, zero_point, grid), lambda t: snap(t, scale, zero_point, grid), x), None
    codes = codes_of(scale, zero_point, grid)

    def again(t: Tensor) -> Tensor:
        return compiled.snap(t, torch.empty_like(t), codes)

    return follows_from(again(x), again, x), (compiled, codes)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Round ``x`` to the grid (no gradient to scale or zero point, straight-through to ``x``).

    Args:
        x: float, any shape; computed in float32 and returned in the dtype of ``x``.
        scale: float32, broadcastable to ``x``.
        zero_point: int32, same shape as scale.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _FakeQuantize.apply(x.float(), scale, zero_point.float(), grid)
    else:
        out = snap(x.float(), scale, zero_point.to(scale.dtype), grid)
    return out.to(x.dtype)


def fake_quantize_open(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """As :func:`fake_quantize`, but the gradient passes everywhere, so nothing is kept for the backward pass.

    For ranges that hold all values by construction, such as probabilities in [0, 1].
    """
    out: Tensor = _FakeQuantizeOpen.apply(x.float(), scale, zero_point, grid)
    return out.to(x.dtype)


class _FakeQuantizeOpen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        return _snapped(x, scale, zero_point.to(scale.dtype), grid)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


def fake_quantize_learned(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """As :func:`fake_quantize`, per tensor, with gradients to a 0-dim float ``scale`` and integer-valued float
    ``zero_point`` (rounded upstream with a straight-through estimator)."""
    out: Tensor = _FakeQuantize.apply(x.float(), scale, zero_point, grid)
    return out.to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        out, ctx.compiled = _snapped(x, scale, zero_point, grid)
        ctx.save_for_backward(x, None if ctx.compiled else out, scale, zero_point)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, out, scale, zero_point = ctx.saved_tensors
        grad_scale = grad_zero_point = None
        if ctx.compiled and ctx.needs_input_grad[1]:
            if grad.stride() != x.stride():
                grad = torch.empty_like(x).copy_(grad)
            compiled, codes = ctx.compiled
            step, low, high = codes  # in double: the ends below, rounded to float32, are those of ends_of
            grad_x, moved, clipped = compiled.snap_backward(grad, x, codes, (low - 0.5) * step, (high + 0.5) * step)
            if ctx.needs_input_grad[2]:
                grad_zero_point = scale.new_tensor(-step * clipped)
            return grad_x, scale.new_tensor(moved / step), grad_zero_point, None
        grad_x = inside_only(grad, x, scale, zero_point, ctx.grid)
        if ctx.needs_input_grad[1]:
            flat, flat_x = grad.reshape(-1), grad_x.reshape(-1)
            grad_scale = (torch.dot(flat, out.reshape(-1)) - torch.dot(flat_x, x.reshape(-1))) / scale
            if ctx.needs_input_grad[2]:
                grad_zero_point = -scale * (flat.sum() - flat_x.sum())
        return grad_x, grad_scale, grad_zero_point, None


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return x + (x.round() - x).detach()
