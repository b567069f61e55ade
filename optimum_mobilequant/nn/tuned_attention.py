"""Attention of the student on the CPU: one autograd node that keeps neither scores nor probabilities.

A slice, the query heads that share one KV head, goes through all of it while it lies in the cache; the backward pass
computes the slice's probabilities again. Memory then grows with the length of a sequence, not with its square, as in
FlashAttention (Dao et al. 2022). Whole rows are at hand here, so scores and probabilities are rounded as in the plain
form, :func:`.attention.quantized_attention`. Keys that the mask hides from a whole block of queries, in a causal mask
nearly half of them, are left out: their probability is 0 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..numerics.fake import codes_of, compiled_passes, snap_
from ..numerics.product import product
from ..numerics.qparams import Grid

if TYPE_CHECKING:
    from ..kernels.tuning import Codes, Passes

# Queries of a sequence whose keys are chosen together.
_BLOCK = 128


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
        ctx.save_for_backward(query, key, value)
        ctx.blocks = _blocks(mask, query, key)
        ctx.rounding = _Rounding.of(scaling, scores, probabilities)
        out = torch.empty(query.shape, dtype=query.dtype)
        parts = (_of_queries(query, key), *(t.flatten(0, 1) for t in (key, value)), _of_queries(out, key))
        for blocks, q, k, v, o in zip(ctx.blocks, *parts, strict=True):
            for block in blocks:
                p = ctx.rounding.probabilities(block.queries(q), k[block.keys], block.mask, rounded=True)
                block.put(o, product(p, v[block.keys].t()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        found = torch.empty(query.shape), torch.zeros(key.shape), torch.zeros(value.shape)
        wide = (_of_queries(t, key) for t in (query, grads[0], found[0]))
        narrow = (t.flatten(0, 1) for t in (key, value, *found[1:]))
        slices = zip(ctx.blocks, *wide, *narrow, strict=True)
        for blocks, q, grad, grad_q, k, v, grad_k, grad_v in slices:
            for block in blocks:
                rows, own, keys = block.queries(q), block.queries(grad), k[block.keys]
                p = ctx.rounding.probabilities(rows, keys, block.mask)
                slope, p = ctx.rounding.slope(product(own, v[block.keys]), p)
                grad_v[block.keys] += product(p.t(), own.t())
                grad_k[block.keys] += product(slope.t(), rows.t())
                block.put(grad_q, product(slope, keys.t()))
        return *found, None, None, None, None


def _of_queries(x: Tensor, key: Tensor) -> Tensor:
    """Queries by sequence and KV head, ``[batch * kv_heads, heads of each, length, head_dim]``."""
    batch, groups = key.shape[:2]
    return x.reshape(batch * groups, -1, *x.shape[2:])


@dataclass(frozen=True)
class _Block:
    """Some queries of a sequence, in all heads of a slice, and the keys that they may see."""

    rows: slice
    keys: slice
    mask: Tensor | None  # [rows, keys]

    def queries(self, x: Tensor) -> Tensor:
        """``[heads, length, head_dim]`` -> ``[heads * rows, head_dim]``."""
        return x[:, self.rows].flatten(0, 1)

    def put(self, x: Tensor, value: Tensor) -> None:
        """Inverse of :meth:`queries`."""
        part = x[:, self.rows]
        part.copy_(value.view(part.shape))


_planes_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # all layers are given one mask


def _blocks(mask: Tensor | None, query: Tensor, key: Tensor) -> list[list[_Block]]:
    """The blocks of each slice."""
    batch, heads = key.shape[:2]
    if mask is None:
        whole = [_Block(slice(0, query.shape[2]), slice(0, key.shape[2]), None)]
        return [whole] * (batch * heads)
    if mask not in _planes_of:
        _planes_of[mask] = _planes(mask[:, 0])
    planes = _planes_of[mask]
    return [planes[b if len(planes) > 1 else 0] for b in range(batch) for _ in range(heads)]


def _planes(mask: Tensor) -> list[list[_Block]]:
    """The blocks of each sequence of a mask ``[batch or 1, length, keys]``. Keys between the first and the last that a
    block sees in any sequence count as seen."""
    planes: list[list[_Block]] = [[] for _ in mask]
    for start in range(0, mask.shape[1], _BLOCK):
        rows, keys = slice(start, start + _BLOCK), slice(None)
        seen = mask[:, rows] > torch.finfo(mask.dtype).min / 2
        # A row of padding that sees nothing has equal probabilities everywhere.
        if seen.any(-1).all():
            places = seen.flatten(0, 1).any(0).nonzero()
            keys = slice(int(places[0]), int(places[-1]) + 1)
        for plane, blocks in zip(mask, planes, strict=True):
            blocks.append(_Block(rows, keys, plane[rows, keys].clone()))
    return planes


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
