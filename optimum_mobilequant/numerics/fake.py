"""Fake quantization: the values of quantize-then-dequantize, with straight-through gradients.

Each function is a single autograd node. Written with elementary operations the same arithmetic needs five nodes and
keeps five tensors for the backward pass; here the backward recomputes the clipping mask from the input.

Gradients (method of LSQ+, Bhalgat et al. 2020, for scale and zero point; MobileQuant section 3.2 for their use), with
``inside`` the mask of unclipped elements and ``x_hat`` the output::

    d x          = g * inside
    d scale      = sum(g * (x_hat - inside * x)) / scale
    d zero_point = -scale * sum(g * (1 - inside))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .qparams import Grid, weight_qparams
from .recompute import follows_from


def _snap(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
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


def _inside_only(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """``grad`` where ``x`` is not clipped, else 0. An element is clipped when it lies beyond the half-step around the
    outermost codes."""
    low, high = (grid.qmin - 0.5 - zero_point) * scale, (grid.qmax + 0.5 - zero_point) * scale
    if _on_cpu(zero_point):
        return torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
    return torch.where((x > low) & (x < high), grad, 0.0)


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
        out = _snap(x.float(), scale, zero_point.to(scale.dtype), grid)
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
        zero_point = zero_point.to(scale.dtype)
        return follows_from(_snap(x, scale, zero_point, grid), lambda t: _snap(t, scale, zero_point, grid), x)

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
        out = _snap(x, scale, zero_point, grid)
        ctx.save_for_backward(x, out, scale, zero_point)
        ctx.grid = grid
        scale, zero_point = scale.detach(), zero_point.detach()
        return follows_from(out, lambda t: _snap(t, scale, zero_point, grid), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, out, scale, zero_point = ctx.saved_tensors
        grad_x = _inside_only(grad, x, scale, zero_point, ctx.grid)
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            flat, flat_x = grad.reshape(-1), grad_x.reshape(-1)
            grad_scale = (torch.dot(flat, out.reshape(-1)) - torch.dot(flat_x, x.reshape(-1))) / scale
            if ctx.needs_input_grad[2]:
                grad_zero_point = -scale * (flat.sum() - flat_x.sum())
        return grad_x, grad_scale, grad_zero_point, None


def fake_quantize_weight(
    weight: Tensor,
    row_log: Tensor | None,
    column_log: Tensor | None,
    clip: Tensor | None,
    grid: Grid,
    *,
    symmetric: bool,
    per_channel: bool,
) -> Tensor:
    """Rescale rows and columns, take the clipped range of the result, round to it: one node.

    ``W' = exp(row_log)[:, None] * W * exp(column_log)[None, :]``; the range of each unit (output channel or whole
    tensor) is that of ``W'`` times ``sigmoid(clip)`` (learnable weight clipping: OmniQuant, Shao et al. 2024), so the
    scales follow the transform at every step (MobileQuant, section 3.2).

    Args:
        weight: float32 ``[out, in]``.
        row_log: ``[out]`` or None. column_log: ``[in]`` or None. Natural logarithms of the scales.
        clip: logits, ``[units, 2]`` for (low, high), or None for the full range; ``units`` is ``out`` or 1.

    Returns:
        float32 ``[out, in]``, with gradients to weight, row_log, column_log and clip.
    """
    out: Tensor = _FakeQuantizeWeight.apply(weight, row_log, column_log, clip, grid, symmetric, per_channel)
    return out


def rescale(weight: Tensor, row_log: Tensor | None, column_log: Tensor | None) -> Tensor:
    """``exp(row_log)[:, None] * weight * exp(column_log)[None, :]`` (a vector weight has rows only)."""
    if row_log is not None:
        weight = weight * (row_log.exp()[:, None] if weight.ndim == 2 else row_log.exp())
    if column_log is not None:
        weight = weight * column_log.exp()[None, :]
    return weight


def clipped_range(weight: Tensor, clip: Tensor | None, *, symmetric: bool, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Low and high end ``[units, 1]`` of each unit of ``weight`` after clipping. A symmetric range is (-m, m)."""
    view = weight if per_channel else weight.reshape(1, -1)
    high, low = view.amax(1, keepdim=True).clamp(min=0.0), view.amin(1, keepdim=True).clamp(max=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if clip is not None:
        share = torch.sigmoid(clip)
        low, high = (
            (-high * share[:, 1:], high * share[:, 1:]) if symmetric else (low * share[:, :1], high * share[:, 1:])
        )
    return low, high


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        row_log: Tensor | None,
        column_log: Tensor | None,
        clip: Tensor | None,
        grid: Grid,
        symmetric: bool,
        per_channel: bool,
    ) -> Tensor:
        scaled = rescale(weight, row_log, column_log)
        low, high = clipped_range(scaled, clip, symmetric=symmetric, per_channel=per_channel)
        scale, zero_point = weight_qparams(low, high, grid, symmetric)
        out = _snap(scaled, scale, zero_point.float(), grid)
        # Only the weight and vectors are kept: the rescaled copy and the result are recomputed.
        ctx.save_for_backward(weight, row_log, column_log, clip, out, low, high, scale, zero_point)
        ctx.scheme = (grid, symmetric, per_channel)

        def again(weight: Tensor) -> Tensor:
            return _snap(rescale(weight, rows, columns), scale, zero_point.float(), grid)

        rows, columns = (None if t is None else t.detach() for t in (row_log, column_log))
        return follows_from(out, again, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, row_log, column_log, clip, out, low, high, scale, zero_point = ctx.saved_tensors
        grid, symmetric, per_channel = ctx.scheme
        scaled = rescale(weight, row_log, column_log)
        grad_scaled = _inside_only(grad, scaled, scale, zero_point, grid)
        product = grad_scaled * scaled  # d/dlog of a scale is the sum of these over what it multiplies

        def per_unit(t: Tensor) -> Tensor:
            return t.sum(1, keepdim=True) if per_channel else t.sum().reshape(1, 1)

        grad_scale = (per_unit(grad * out) - per_unit(product)) / scale
        if symmetric:
            grad_high, grad_low = grad_scale / grid.qmax, torch.zeros_like(grad_scale)
        else:
            steps = grid.qmax - grid.qmin
            grad_zero = -scale * (per_unit(grad) - per_unit(grad_scaled))
            grad_scale = grad_scale + grad_zero * low / scale.square()
            grad_high, grad_low = grad_scale / steps, -grad_scale / steps - grad_zero / scale
        grad_clip = None
        if clip is not None:
            share = torch.sigmoid(clip)
            slope = torch.cat([grad_low * low, grad_high * high], dim=1) * (1 - share)  # d/dlogit of sigmoid * end
            grad_clip = slope if not symmetric else torch.cat([torch.zeros_like(slope[:, :1]), slope[:, 1:]], dim=1)
        # The ends move with the extreme elements: their share of the gradient goes to those rows and columns.
        product = product + _range_gradient(scaled, grad_low * low, grad_high * high, symmetric, per_channel)
        grad_row = product.sum(1) if ctx.needs_input_grad[1] else None
        grad_column = product.sum(0) if ctx.needs_input_grad[2] else None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            # product = gradient * scaled, elementwise; where scaled is 0 it sets no end of a range
            grad_weight = rescale(torch.where(scaled == 0, grad_scaled, product / scaled), row_log, column_log)
        return grad_weight, grad_row, grad_column, grad_clip, None, None, None


def _range_gradient(scaled: Tensor, low_part: Tensor, high_part: Tensor, symmetric: bool, per_channel: bool) -> Tensor:
    """Spread d loss / d log(end) of each unit on the element that sets that end, as ``[out, in]``."""
    view = scaled if per_channel else scaled.reshape(1, -1)
    spread = torch.zeros_like(view)
    if symmetric:
        spread.scatter_add_(1, view.abs().argmax(1, keepdim=True), high_part)
    else:
        spread.scatter_add_(1, view.argmax(1, keepdim=True), high_part)
        spread.scatter_add_(1, view.argmin(1, keepdim=True), low_part)
    return spread.view_as(scaled)


def fake_quantize_offset(
    base: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor, gain_log: Tensor, grid: Grid
) -> Tensor:
    """Round a weight with a learned offset: the value of code ``round(base + offset) + zero_point``, times a row gain.

    Args:
        base: the weight in steps of its scale, float32 ``[out, in]``, constant. scale, zero_point: ``[out, 1]``,
            constant.
        offset: in steps, ``[out, in]``; its gradient is straight-through where the code is not clipped (SignRound,
            Cheng et al. 2023).
        gain_log: ``[out, 1]``, logarithm of a change of the row's scale.
    """
    out: Tensor = _FakeQuantizeOffset.apply(base, scale, zero_point, offset, gain_log, grid)
    return out


def _snap_offset(base: Tensor, offset: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (base + offset).round_().clamp_(low, high).mul_(step)


class _FakeQuantizeOffset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor, gain_log: Tensor, grid: Grid
    ) -> Tensor:
        step = scale * gain_log.exp()
        low, high = (grid.qmin - zero_point).float(), (grid.qmax - zero_point).float()
        out = _snap_offset(base, offset, step, low, high)
        ctx.save_for_backward(base, offset, step, out, low, high)
        return follows_from(out, _snap_offset, base, offset, step, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        base, offset, step, out, low, high = ctx.saved_tensors
        place = base + offset
        inside = (place > low - 0.5) & (place < high + 0.5)
        return None, None, None, grad * step * inside, (grad * out).sum(1, keepdim=True), None


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return x + (x.round() - x).detach()
