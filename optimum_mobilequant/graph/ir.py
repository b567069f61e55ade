"""The integer graph of a decoder: named tensors with their encodings, and the operations between them.

It is the plan with operands. The integer executor, the ONNX exporter, the encodings and the memory plan all read this
one description, so none of them can compute or name something that the others do not. Shapes are symbolic: a
dimension is a number or one of ``batch``, ``sequence`` (new tokens), ``past`` (cached tokens) and ``total``
(past + sequence).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics import Grid

Dim = int | str
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"


@dataclass(frozen=True)
class Encoding:
    """Scale and zero point of a tensor's integers: ``x = (code - zero_point) * scale``.

    Args:
        scale: float32, 0-dim; or ``[units]`` with one scale for each index of the tensor's first axis; or
            ``[units, blocks]`` with one for each run of ``block_size`` values along the second axis of a matrix.
        zero_point: int32, shape of ``scale``.
        grid: the integers.
        block_size: values that share a scale, 0 unless ``scale`` has two axes.
    """

    scale: Tensor
    zero_point: Tensor
    grid: Grid
    block_size: int = 0

    @property
    def per_channel(self) -> bool:
        return self.scale.ndim == 1

    @property
    def per_block(self) -> bool:
        return self.scale.ndim == 2

    def scaled(self, factor: float) -> Encoding:
        """The same integers, read as values ``factor`` times as large."""
        return Encoding(self.scale * factor, self.zero_point, self.grid, self.block_size)

    def same_as(self, other: Encoding) -> bool:
        return (
            (self.grid, self.block_size) == (other.grid, other.block_size)
            and self.scale.shape == other.scale.shape
            and bool((self.scale == other.scale).all() and (self.zero_point == other.zero_point).all())
        )

    def broadcast(self, dims: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point in shapes that broadcast against codes of ``dims`` axes."""
        if self.per_block:
            scale, zero_point = (t.repeat_interleave(self.block_size, 1) for t in (self.scale, self.zero_point))
            return scale, zero_point
        shape = (-1, *[1] * (dims - 1)) if self.per_channel else ()
        return self.scale.view(shape), self.zero_point.view(shape)


@dataclass(frozen=True)
class Value:
    """One tensor of the graph.

    Args:
        name: the quantizer's dotted path for an activation, ``<module>.weight``/``.bias`` for a constant.
        shape: numbers and symbols.
        encoding: None for token ids, the attention mask, and for float tensors of a weight-only model.
        role: key of the plan's roles; ``"input"`` for what the caller gives; ``"move"`` for moved data.
        moved_from: the tensor whose encoding this one inherits because the producer only moves data, or None.
    """

    name: str
    shape: tuple[Dim, ...]
    encoding: Encoding | None
    role: str
    moved_from: str | None = None


@dataclass(frozen=True)
class Op:
    """One operation. ``kind`` is a key of :data:`KINDS`, which says what the inputs and attributes are."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, int | float | str | bool] = field(default_factory=dict)


# kind -> what it computes. Letters: B batch, S sequence, P past, T total, H query heads, K KV heads, D head_dim.
KINDS: dict[str, str] = {
    "embedding": "(ids [B,S], table [vocabulary,n]) -> [B,S,n]; the table holds codes of the output's own grid",
    "norm": "(x [...,n], gain [n], bias [n]?) over the last axis; attributes eps, centre (LayerNorm)",
    "linear": "(x [B,S,in], weight [out,in], bias [out]?) -> [B,S,out]",
    "split_heads": "(x [B,S,heads*D]) -> [B,heads,S,D]; attribute heads; moves data",
    "merge_heads": "(x [B,H,S,D]) -> [B,S,H*D]; moves data",
    "rope": "(x [B,heads,S,D], cos [B,1,S,r/2], sin, shift [heads,1,D]?) -> [B,heads,S,D]; attribute rotary_dims r: "
    "the first r dims rotate in pairs (i, i + r/2), the others pass; the constant shift is added to all",
    "concat": "(past [B,K,P,D], new [B,K,S,D]) -> [B,K,T,D]; equal encodings; moves data",
    "scores": "(q [B,H,S,D], k [B,K,T,D]) -> [B,H,S,T]; attribute groups H/K; 1/sqrt(D) is folded into q's scales",
    "mask": "(scores [B,H,S,T], visible [B,1,S,T]) -> [B,H,S,T]; a hidden position gets the grid's lowest code",
    "softmax": "(masked scores [B,H,S,T]) over the last axis",
    "context": "(probabilities [B,H,S,T], v [B,K,T,D]) -> [B,H,S,D]; attribute groups",
    "add": "(a, b), equal shapes",
    "activation": "(x); attribute function: a key of transformers' ACT2FN",
    "multiply": "(a, b), equal shapes",
}
MOVES = frozenset({"split_heads", "merge_heads", "concat"})


@dataclass
class Graph:
    """A whole decoder.

    Args:
        values: every tensor by name, in the order of the data flow.
        ops: in an order in which they can run.
        inputs: ``input_ids``, ``attention_mask``, ``position_cos``, ``position_sin``, then past_key_i, past_value_i.
        outputs: ``logits``' name, then for each layer the new keys' and new values' names.
        constants: name -> function that returns the codes (integer dtype, the value's shape), or the float tensor
            where the value has no encoding. Called when needed, so that 4-bit weights stay packed until then.
        facts: layers, heads, kv_heads, head_dim, rotary_dims, hidden, mlp, vocabulary.
        prefix: name of a cache input -> codes ``[kv_heads, length, head_dim]`` that its first slots hold before any
            text; empty without a prefix.
    """

    values: dict[str, Value]
    ops: list[Op]
    inputs: list[str]
    outputs: list[str]
    constants: dict[str, Callable[[], Tensor]]
    facts: dict[str, int]
    prefix: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prefix_length(self) -> int:
        """Slots of the cache that are filled before any text."""
        return next((codes.shape[1] for codes in self.prefix.values()), 0)

    def producer(self, name: str) -> Op | None:
        """The operation that makes a tensor; None for inputs and constants."""
        return next((op for op in self.ops if op.output == name), None)

    def size(self, name: str, **symbols: int) -> tuple[int, ...]:
        """Shape in numbers, e.g. ``graph.size(name, batch=1, sequence=16, past=48)``."""
        symbols = {**symbols}
        if PAST in symbols and SEQUENCE in symbols:
            symbols.setdefault(TOTAL, symbols[PAST] + symbols[SEQUENCE])
        return tuple(dim if isinstance(dim, int) else symbols[dim] for dim in self.values[name].shape)


def storage_dtype(encoding: Encoding) -> torch.dtype:
    """The dtype in which codes of an encoding are kept."""
    return encoding.grid.dtype
