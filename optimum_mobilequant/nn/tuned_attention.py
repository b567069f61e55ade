"""Attention of the student on the CPU: one autograd node that keeps neither scores nor probabilities.

A slice, the query heads that share one KV head, goes through all of it while it lies in the cache; the backward pass
computes the slice's probabilities again. Memory then grows with the length of a sequence, not with its square, as in
FlashAttention (Dao et al. 2022). Whole rows are at hand here, so scores and probabilities are rounded as in the plain
form, :func:`.attention.quantized_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics.fake import snap_
from ..numerics.product import product
from ..numerics.qparams import Grid


@dataclass(frozen=True)
class Encoding:
    """A fixed grid: 0-dim scale and zero point."""

    scale: Tensor
    zero_point: Tensor
    grid: Grid


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    scores: Encoding,
    probabilities: Encoding,
) -> Tensor:
    """Context of attention whose scores and probabilities are rounded, with straight-through gradients.

    The gradient passes through both roundings everywhere: their ranges hold all values by construction.

    Args:
        query: float32 ``[batch, heads, length, head_dim]``. key, value: ``[batch, kv_heads, keys, head_dim]``.
        mask: additive float32 ``[batch or 1, 1, length, keys]``, or None.

    Returns:
        ``[batch, heads, length, head_dim]``.
    """
    out: Tensor = _Attention.apply(query, key, value, mask, scaling, scores, probabilities)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        scores: Encoding,
        probabilities: Encoding,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.rest = scaling, scores, probabilities
        out = torch.empty(query.shape, dtype=query.dtype)
        for b, head, rows in _slices(query, key):
            q, k, v = query[b, rows].flatten(0, 1), key[b, head], value[b, head]
            p = _rounded(_probabilities(q, k, mask, b, scaling, scores), probabilities)
            out[b, rows] = product(p, v.t()).view_as(query[b, rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        scaling, scores, probabilities = ctx.rest
        grad_query, grad_key, grad_value = (torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
        for b, head, rows in _slices(query, key):
            q, k, v = query[b, rows].flatten(0, 1), key[b, head], value[b, head]
            grad = grads[0][b, rows].flatten(0, 1)
            p = _probabilities(q, k, mask, b, scaling, scores)
            slope = torch.ops.aten._softmax_backward_data(product(grad, v), p, -1, p.dtype).mul_(scaling)
            grad_value[b, head] = product(_rounded(p, probabilities).t(), grad.t())
            grad_query[b, rows] = product(slope, k.t()).view_as(query[b, rows])
            grad_key[b, head] = product(slope.t(), q.t())
        return grad_query, grad_key, grad_value, None, None, None, None


def _slices(query: Tensor, key: Tensor) -> list[tuple[int, int, slice]]:
    """(sequence, KV head, its query heads)."""
    groups = query.shape[1] // key.shape[1]
    return [(b, h, slice(h * groups, (h + 1) * groups)) for b in range(len(query)) for h in range(key.shape[1])]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, b: int, scaling: float, encoding: Encoding) -> Tensor:
    scores = _rounded(product(q, k).mul_(scaling), encoding)
    if mask is not None:
        visible = mask[b if len(mask) > 1 else 0, 0]
        scores.view(-1, *visible.shape).add_(visible)
    return torch.softmax(scores, dim=-1)


def _rounded(x: Tensor, encoding: Encoding) -> Tensor:
    return snap_(x, encoding.scale, encoding.zero_point, encoding.grid)
