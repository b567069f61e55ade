"""Decoder layers by torch's own operators: four integer products, and few float32 passes between them.

For machines without a compiler. Floats between the products count steps of a grid (codes less the zero point), so a
tensor is rounded by ``round`` and ``clamp`` in place and never divided by a scale: the scales are in the products'
factors. Every tensor with an encoding is rounded to it. Sums and products in float32 are not those of integers, so a
code can differ from the executor's by one step, rarely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.ir import Graph, Op
from ..graph.operators import Static, encoding_of, shift_of
from ..kernels import LinearSpec, Output, onednn
from ..numerics import Grid
from .blocks import NotFused
from .linear import KERNEL_BITS

_SCORES = 2**19  # attention scores that are computed at once
_REAL, _CODES = Output.real(torch.float32), Output.codes(1.0, 0, Grid(8, signed=False))


@dataclass(frozen=True)
class Range:
    """A grid in steps from its zero point."""

    scale: float
    zero: int
    low: int
    high: int

    @classmethod
    def of(cls, graph: Graph, name: str) -> Range:
        found = Static(graph, name)
        return cls(found.scale, found.zero, -found.zero, found.grid.qmax - found.zero)

    @property
    def bits(self) -> int:
        return (self.high - self.low).bit_length()

    def round_(self, steps: Tensor) -> Tensor:
        """Onto the grid, in place."""
        return steps.round_().clamp_(self.low, self.high)

    def codes(self, steps: Tensor) -> Tensor:
        """uint8 codes of steps, which are overwritten."""
        return steps.add_(self.zero).round_().clamp_(0, self.high - self.low).to(torch.uint8)


class Norm:
    """RMSNorm or LayerNorm: steps in, steps out, not rounded.

    Args:
        unit: what its input counts in; None: steps of the input's grid.
    """

    def __init__(self, graph: Graph, op: Op, *, unit: float | None = None):
        source, self.out = Static(graph, op.inputs[0]), Range.of(graph, op.output)
        gain = encoding_of(graph, op.inputs[1])
        steps = graph.constants[op.inputs[1]]().double() - gain.zero_point.double()
        self.gain = (steps * gain.scale.double() / self.out.scale).float()
        self.bias = None
        if len(op.inputs) == 3:
            bias = encoding_of(graph, op.inputs[2])
            self.bias = (graph.constants[op.inputs[2]]().double() * bias.scale.double() / self.out.scale).float()
        self.centre = bool(op.attributes["centre"])
        self.eps = float(op.attributes["eps"]) / (source.scale if unit is None else unit) ** 2

    def __call__(self, x: Tensor) -> Tensor:
        if self.centre:
            x = x - x.mean(-1, keepdim=True)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        out = x * torch.rsqrt(squares / x.shape[-1] + self.eps)
        out = out.mul_(self.gain)
        return out if self.bias is None else out.add_(self.bias)


class Product:
    """Linears that read the same tensor, as one oneDNN product: float32 steps of each part's grid, or its codes.

    Args:
        ops: of the graph, in their order. codes: whether to give codes.

    Raises:
        NotFused: something that such a product does not compute.
    """

    def __init__(self, graph: Graph, ops: tuple[Op, ...], *, codes: bool = False):
        x = Static(graph, ops[0].inputs[0])
        self.parts = [Range.of(graph, op.output) for op in ops]
        self.sizes: list[int] = []
        if x.grid.bits != 8:
            raise NotFused(f"{ops[0].name} reads {x.grid.bits}-bit codes")
        if codes and any(part.bits != 8 for part in self.parts):
            raise NotFused(f"{ops[0].name} writes {self.parts[0].bits}-bit codes")
        weights, factors, biases, zeros, bits = [], [], [], [], []
        for op, part in zip(ops, self.parts, strict=True):
            encoding, weight = encoding_of(graph, op.inputs[1]), graph.constants[op.inputs[1]]()
            rows, zero = weight.shape[0], encoding.zero_point.to(torch.int32)
            if encoding.grid.bits not in KERNEL_BITS:
                raise NotFused(f"{op.name} has {encoding.grid.bits}-bit weights, and kernels take up to 8")
            if encoding.grid.bits == 8 and bool(zero.any()):
                raise NotFused(f"{op.name} has asymmetric 8-bit weights")
            factor = (x.scale * encoding.scale.double().reshape(-1) / part.scale).expand(rows)
            given = graph.constants[op.inputs[2]]().double() if len(op.inputs) == 3 else torch.zeros(rows)
            self.sizes.append(rows)
            zeros.append(zero.reshape(-1).expand(rows))
            weights.append((weight.to(torch.int32) - zero.reshape(-1, 1)).to(torch.int8))
            factors.append(factor)
            biases.append(factor * given + (part.zero if codes else 0))
            bits.append(KERNEL_BITS[encoding.grid.bits])
        self.output = _CODES if codes else _REAL
        joined, self.zero_points = torch.cat(weights), torch.cat(zeros)
        self.spec = LinearSpec(max(bits), 8, True, joined.shape[1], len(joined), "cpu", self.output)
        if reason := onednn.supports(self.spec):
            raise NotFused(reason)
        self.packed = onednn.pack_factors(joined, torch.cat(factors), torch.cat(biases), x.zero, (max(bits), 8))
        device = joined.device
        low, high = ([float(getattr(part, end)) for part in self.parts] for end in ("low", "high"))
        sizes = torch.tensor(self.sizes, device=device)
        self.low, self.high = (torch.tensor(ends, device=device).repeat_interleave(sizes) for ends in (low, high))

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 codes ``[..., in]`` -> ``[..., out]``: rounded steps, or codes."""
        packed = self.packed
        out: Tensor = getattr(torch.ops.mobilequant, self.spec.op)(
            x, packed.weight, packed.bias, packed.multiplier, None, packed.input_zero_point, self.spec.in_features,
            "onednn", self.output.dtype, self.output.qmax, 0, 1.0,
        )  # fmt: skip
        if out.dtype == torch.uint8:
            return out
        if len(self.parts) == 1:
            return self.parts[0].round_(out)
        return out.round_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class Attention:
    """Encodings of one attention.

    Args:
        shift: float32 ``[kv_heads, 1, dims]``, steps that are added to rotated keys; or None.
    """

    query: Range
    key: Range
    value: Range
    scores: Range
    probabilities: Range
    context: Range
    half: int
    query_norm: Norm | None
    key_norm: Norm | None
    shift: Tensor | None

    def rotated(
        self,
        x: Tensor,
        norm: Norm | None,
        source: Range,
        out: Range,
        cos: Tensor,
        sin: Tensor,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Steps of heads ``[batch, heads, sequence, dims]``, rotated, shifted and rounded."""
        if norm is not None:
            x, source = norm.out.round_(norm(x)), norm.out
        factor, half = source.scale / out.scale, self.half
        cos, sin = (t[:, None, :, : 2 * half] * factor for t in (cos, sin))
        swapped = [-x[..., half : 2 * half], x[..., :half]]
        if (still := x.shape[-1] - 2 * half) > 0:
            swapped.append(x[..., 2 * half :])
            cos, sin = F.pad(cos, (0, still), value=factor), F.pad(sin, (0, still))
        turned = (x * cos).addcmul_(torch.cat(swapped, -1), sin)
        return out.round_(turned if shift is None else turned.add_(shift))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Context codes, uint8 ``[batch, sequence, heads * dims]``.

        Args:
            query: steps ``[batch, heads, sequence, dims]``, overwritten. keys, values: codes less 128, int8
                ``[batch, kv_heads, total, dims]``. mask: additive, or None: later positions are hidden.
        """
        batch, heads, length, dims = query.shape
        total = keys.shape[2]
        if mask is None and length > 1:
            hidden = torch.ones(length, total, dtype=torch.bool, device=query.device).triu_(total - length + 1)
            mask = torch.zeros(length, total, device=query.device).masked_fill_(hidden, torch.finfo(torch.float32).min)
            mask = mask[None, None]
        query = query.mul_(self.query.scale * self.key.scale / self.scores.scale)
        key = keys.float().add_(128 - self.key.zero).transpose(2, 3)
        value = values.float().add_(128 - self.value.zero)
        # Some rows at a time: their scores then stay in the cache from one pass to the next.
        rows = max(1, _SCORES // max(1, batch * heads * total))
        found = [
            self._context(part, key, value, None if mask is None else mask[:, :, i * rows : (i + 1) * rows, :total])
            for i, part in enumerate(query.split(rows, 2))
        ]
        context = torch.cat(found, 2).transpose(1, 2).reshape(batch, length, heads * dims)
        context.mul_(self.probabilities.scale * self.value.scale / self.context.scale)
        return self.context.codes(context)

    def _context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Steps of probabilities times steps of values, of some rows: ``[batch, heads, rows, dims]``."""
        batch, heads, rows, dims = query.shape
        # The heads that share a KV head are rows of one product.
        scores = torch.matmul(query.reshape(batch, key.shape[1], -1, dims), key).view(batch, heads, rows, -1)
        scores = self.scores.round_(scores).mul_(self.scores.scale)
        if mask is not None:
            scores.add_(mask)
        shares = torch.softmax(scores, -1).mul_(1 / self.probabilities.scale)
        shares = self.probabilities.round_(shares).view(batch, key.shape[1], -1, key.shape[3])
        return torch.matmul(shares, value).view(batch, heads, rows, dims)


def added_steps(graph: Graph, op: Op) -> Tensor | None:
    """What a rotation adds, float32 ``[heads, 1, dims]`` in steps of its output; None if it adds nothing."""
    if (shift := shift_of(graph, op)) is None:
        return None
    scale = Static(graph, op.inputs[0]).scale * 2.0**-14 / Static(graph, op.output).scale
    return (shift.double() * scale).float()


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """``table[codes]`` of uint8 codes."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
