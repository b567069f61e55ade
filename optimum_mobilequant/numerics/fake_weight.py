"""Fake quantization of weights: rescaled, clipped and rounded, or rounded with learned offsets; one node each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fake import compiled_passes, inside_only, snap
from .qparams import Grid, weight_qparams
from .recompute import follows_from

_ONE = torch.ones(())  # a scale on the CPU


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
    return clipped_ends(view.amin(1, keepdim=True), view.amax(1, keepdim=True), clip, symmetric=symmetric)


def clipped_ends(low: Tensor, high: Tensor, clip: Tensor | None, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """:func:`clipped_range` of units whose lowest and highest elements are known."""
    high, low = high.clamp(min=0.0), low.clamp(max=0.0)
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
        rows, columns = (None if t is None else t.detach() for t in (row_log, column_log))
        compiled = None
        if (per_channel or len(weight) == 1) and weight.ndim == 2 and weight.is_contiguous():
            compiled = compiled_passes(weight, _ONE)
        ctx.compiled, ctx.scheme = compiled, (grid, symmetric, per_channel)
        if compiled is None:
            scaled = rescale(weight, rows, columns)
            low, high = clipped_range(scaled, clip, symmetric=symmetric, per_channel=per_channel)
            scale, zero_point = weight_qparams(low, high, grid, symmetric)
            zero = zero_point.float()
            out = snap(scaled, scale, zero, grid)
            # Only the weight and vectors are kept: the rescaled copy and the result are recomputed.
            ctx.save_for_backward(weight, row_log, column_log, clip, out, low, high, scale, zero_point)
            return follows_from(out, lambda w: snap(rescale(w, rows, columns), scale, zero, grid), weight)
        by_row, by_column = (None if t is None else t.exp() for t in (rows, columns))
        scaled, ends = compiled.weight_range(weight, by_row, by_column)
        low, high = clipped_ends(ends[0, :, None], ends[1, :, None], clip, symmetric=symmetric)
        scale, zero_point = weight_qparams(low, high, grid, symmetric)
        codes = _row_codes(scale, zero_point, grid, symmetric)
        out = compiled.weight_snap(scaled, None, None, codes, scaled)

        def again(weight: Tensor) -> Tensor:
            return compiled.weight_snap(weight, by_row, by_column, codes, torch.empty_like(weight))

        ctx.save_for_backward(weight, row_log, column_log, clip, None, low, high, scale, zero_point)
        ctx.vectors = (by_row, by_column), codes, ends
        return follows_from(out, again, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, row_log, column_log, clip, out, low, high, scale, zero_point = ctx.saved_tensors
        grid, symmetric, per_channel = ctx.scheme
        if ctx.compiled is not None and not ctx.needs_input_grad[0]:
            return None, *_compiled_backward(ctx, grad.contiguous(), weight, clip, low, high, scale), *[None] * 3
        if out is None:
            out = snap(rescale(weight, row_log, column_log), scale, zero_point.float(), grid)
        scaled = rescale(weight, row_log, column_log)
        grad_scaled = inside_only(grad, scaled, scale, zero_point, grid)
        product = grad_scaled * scaled  # d/dlog of a scale is the sum of these over what it multiplies

        def per_unit(t: Tensor) -> Tensor:
            return t.sum(1, keepdim=True) if per_channel else t.sum().reshape(1, 1)

        grad_scale = (per_unit(grad * out) - per_unit(product)) / scale
        grad_zero = None if symmetric else -scale * (per_unit(grad) - per_unit(grad_scaled))
        grad_low, grad_high = _of_ends(grad_scale, grad_zero, low, scale, grid, symmetric)
        grad_clip = _of_clip(clip, grad_low * low, grad_high * high, symmetric)
        # The ends move with the extreme elements: their share of the gradient goes to those rows and columns.
        product = product + _range_gradient(scaled, grad_low * low, grad_high * high, symmetric, per_channel)
        grad_row = product.sum(1) if ctx.needs_input_grad[1] else None
        grad_column = product.sum(0) if ctx.needs_input_grad[2] else None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            # product = gradient * scaled, elementwise; where scaled is 0 it sets no end of a range
            grad_weight = rescale(torch.where(scaled == 0, grad_scaled, product / scaled), row_log, column_log)
        return grad_weight, grad_row, grad_column, grad_clip, None, None, None


def _compiled_backward(
    ctx: Any, grad: Tensor, weight: Tensor, clip: Tensor | None, low: Tensor, high: Tensor, scale: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the logarithms of rows and columns and of the clipping logits."""
    grid, symmetric, _ = ctx.scheme
    factors, codes, ends = ctx.vectors
    step, lowest, highest = codes
    limits = (lowest - 0.5) * step, (highest + 0.5) * step
    (moved, clipped, by_row), by_column, places = ctx.compiled.weight_backward(
        grad, weight, *factors, codes, *limits, ends
    )
    if symmetric:  # the range is set by the end farther from 0
        at_high = (moved / (step * grid.qmax)) * high.view(-1)
        parts, places = at_high, torch.where(ends[1] >= -ends[0], places[1], places[0])
        at_ends = at_high
    else:
        grad_low, grad_high = _of_ends(
            (moved / step)[:, None], (-step * clipped)[:, None], low, scale, grid, symmetric
        )
        parts = torch.cat([grad_low * low, grad_high * high], dim=1)
        at_ends, parts, places = parts.sum(1), parts.t().flatten(), places.view(-1)
    grad_row = by_row + at_ends if ctx.needs_input_grad[1] else None
    grad_column = by_column.index_add(0, places, parts) if ctx.needs_input_grad[2] else None
    grad_clip = None
    if clip is not None and symmetric:
        grad_clip = torch.zeros_like(clip)
        torch.mul(at_ends, torch.sigmoid(-clip[:, 1]), out=grad_clip[:, 1])
    elif clip is not None:
        grad_clip = _of_clip(clip, grad_low * low, grad_high * high, symmetric)
    return grad_row, grad_column, grad_clip


def _of_ends(
    grad_scale: Tensor, grad_zero: Tensor | None, low: Tensor, scale: Tensor, grid: Grid, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the low and the high end of a range from those of its scale and zero point."""
    if symmetric or grad_zero is None:
        return torch.zeros_like(grad_scale), grad_scale / grid.qmax
    steps = grid.qmax - grid.qmin
    grad_scale = grad_scale + grad_zero * low / scale.square()
    return -grad_scale / steps - grad_zero / scale, grad_scale / steps


def _of_clip(clip: Tensor | None, low_part: Tensor, high_part: Tensor, symmetric: bool) -> Tensor | None:
    """Gradient of the clipping logits from d loss / d log(end)."""
    if clip is None:
        return None
    slope = torch.cat([low_part, high_part], dim=1) * (1 - torch.sigmoid(clip))  # d/dlogit of sigmoid * end
    return slope if not symmetric else torch.cat([torch.zeros_like(slope[:, :1]), slope[:, 1:]], dim=1)


def _row_codes(scale: Tensor, zero_point: Tensor, grid: Grid, symmetric: bool) -> tuple[Tensor, ...]:
    """Scale, lowest and highest code of each row, less its zero point, as the compiled passes take them."""
    scale = scale.reshape(-1).contiguous()
    if symmetric:
        return scale, torch.full_like(scale, grid.qmin), torch.full_like(scale, grid.qmax)
    zero = zero_point.view(-1).float()
    return scale, grid.qmin - zero, grid.qmax - zero


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
        ctx.compiled = None
        if step.shape[1] == 1 and base.is_contiguous() and offset.is_contiguous():
            ctx.compiled = compiled_passes(base, _ONE)
        if (compiled := ctx.compiled) is not None:
            codes = (step.view(-1), low.expand_as(step).reshape(-1), high.expand_as(step).reshape(-1))
            ctx.save_for_backward(base, offset, *codes)

            def again(base: Tensor, offset: Tensor, *codes: Tensor) -> Tensor:
                return compiled.offset(base, offset, codes)

            return follows_from(again(base, offset, *codes), again, base, offset, *codes)
        out = _snap_offset(base, offset, step, low, high)
        ctx.save_for_backward(base, offset, step, out, low, high)
        return follows_from(out, _snap_offset, base, offset, step, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if ctx.compiled is not None:
            base, offset, *codes = ctx.saved_tensors
            grad_offset, gains = ctx.compiled.offset_backward(grad.contiguous(), base, offset, tuple(codes))
            return None, None, None, grad_offset, gains[:, None], None
        base, offset, step, out, low, high = ctx.saved_tensors
        place = base + offset
        inside = (place > low - 0.5) & (place < high + 0.5)
        return None, None, None, grad * step * inside, (grad * out).sum(1, keepdim=True), None
