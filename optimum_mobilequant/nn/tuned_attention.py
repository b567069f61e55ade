"""Attention of the student on the CPU: one autograd node that keeps neither scores nor probabilities.

A slice, the query heads that share one KV head, goes through all of it while it lies in the cache; the backward pass
computes the slice's probabilities again. Memory then grows with the length of a sequence, not with its square, as in
FlashAttention (Dao et al. 2022). Whole rows are at hand here, so scores and probabilities are rounded as in the plain
form, :func:`.attention.quantized_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..numerics.fake import codes_of, compiled_passes, snap_
from ..numerics.product import product
from ..numerics.qparams import Grid

if TYPE_CHECKING:
    from ..kernels.tuning import Codes, Passes


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
        ctx.rounding = _Rounding.of(scaling, scores, probabilities)
        out = torch.empty(query.shape, dtype=query.dtype)
        parts = (_slices(t, key) for t in (query, key, value, out))
        for visible, q, k, v, o in zip(_visible(mask, key), *parts, strict=True):
            o.copy_(product(ctx.rounding.probabilities(q, k, visible, rounded=True), v.t()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        found = tuple(torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
        parts = (_slices(t, key) for t in (query, key, value, grads[0], *found))
        for visible, q, k, v, grad, grad_q, grad_k, grad_v in zip(_visible(mask, key), *parts, strict=True):
            p = ctx.rounding.probabilities(q, k, visible)
            slope, p = ctx.rounding.slope(product(grad, v), p)
            grad_v.copy_(product(p.t(), grad.t()))
            grad_q.copy_(product(slope, k.t()))
            grad_k.copy_(product(slope.t(), q.t()))
        return *found, None, None, None, None


def _slices(x: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """``x`` by sequence and KV head, ``[rows, head_dim]`` each; with ``x`` of queries, those of all its heads."""
    return x.reshape(len(key) * key.shape[1], -1, x.shape[-1]).unbind()


def _visible(mask: Tensor | None, key: Tensor) -> list[Tensor | None]:
    """The mask of each slice, ``[length, keys]``."""
    batch, heads = key.shape[:2]
    if mask is None:
        return [None] * (batch * heads)
    planes = [plane.contiguous() for plane in mask[:, 0]]
    return [planes[b if len(planes) > 1 else 0] for b in range(batch) for _ in range(heads)]


@dataclass(frozen=True)
class _Rounding:
    """The elementwise work on a slice, compiled where that is possible."""

    scaling: float
    scores: Encoding
    rounded: Encoding
    codes: tuple[Codes, Codes]
    compiled: Passes | None

    @classmethod
    def of(cls, scaling: float, scores: Encoding, probabilities: Encoding) -> _Rounding:
        codes = [codes_of(e.scale, e.zero_point, e.grid) for e in (scores, probabilities)]
        return cls(scaling, scores, probabilities, (codes[0], codes[1]), compiled_passes(scores.scale, scores.scale))

    def probabilities(self, q: Tensor, k: Tensor, visible: Tensor | None, *, rounded: bool = False) -> Tensor:
        """Of rounded and masked scores."""
        scores = product(q, k)
        if self.compiled is not None:
            own = self.codes[1] if rounded else None
            return self.compiled.probabilities_(scores, visible, self.scaling, self.codes[0], own)
        scores = _snap(scores.mul_(self.scaling), self.scores)
        if visible is not None:
            scores.view(-1, *visible.shape).add_(visible)
        p = torch.softmax(scores, dim=-1)
        return _snap(p, self.rounded) if rounded else p

    def slope(self, grad: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the scores from that of the probabilities ``p``; and these, rounded. Both are used up."""
        if self.compiled is not None:
            self.compiled.slope_(p, grad, self.scaling, self.codes[1])
            return grad, p
        slope = torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype).mul_(self.scaling)
        return slope, _snap(p, self.rounded)


def _snap(x: Tensor, encoding: Encoding) -> Tensor:
    return snap_(x, encoding.scale, encoding.zero_point, encoding.grid)
