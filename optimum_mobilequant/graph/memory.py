"""The memory a decoder needs: which tensors share bytes, when each is alive, and where it lies.

Sizes stay symbolic in batch, new tokens and cached tokens, so one plan answers for every prompt length. The cache is
a static buffer beside the arena: a step writes its new keys and values into their place in it, and nothing is ever
concatenated. (Both ideas: Transformer-Lite, Li et al. 2024: symbolic shapes, sub-tensors of the KV cache. Offsets:
greedy by size, Pisarchyk and Lee 2020.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .ir import MOVES, Graph
from .symbolic import Maximum, Polynomial

ALIGNMENT = 64
# Operations that may write over an input they are the last to read: every element depends on its own place (or row).
_IN_PLACE = frozenset({"mask", "softmax", "add", "activation", "multiply", "rope"})
_FLOAT_BYTES = 4
_INPUT_BYTES = {"input_ids": 4, "attention_mask": 2}


@dataclass(frozen=True)
class Buffer:
    """Bytes that one or several tensors use, one after the other or as views of each other.

    Args:
        tensors: names, in the order in which they are written.
        bytes: size.
        first, last: indices of the operations between which it is alive, both included; -1 for the graph's inputs,
            the number of operations for its outputs.
    """

    tensors: tuple[str, ...]
    bytes: Polynomial
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        """Whether there is an operation at which both are alive."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class MemoryPlan:
    """What a decoder needs at any sizes.

    Args:
        buffers: of the arena, in the order of their first use.
        cached: new keys and values, written straight into the static cache.
        peak: bytes of the buffers that are alive together, where they are most.
        cache: bytes of the static cache for ``past + sequence`` tokens.
        weights: bytes of all constants.
    """

    buffers: tuple[Buffer, ...]
    cached: tuple[str, ...]
    peak: Maximum
    cache: Polynomial
    weights: int

    def place(self, **symbols: int) -> tuple[list[int], int]:
        """Offsets of the buffers at given sizes, and the bytes of the arena.

        The largest buffer comes first, each at the lowest aligned offset that is free for all its life.
        """
        sizes = [buffer.bytes(**symbols) for buffer in self.buffers]
        offsets = [0] * len(sizes)
        placed: list[int] = []
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            taken = sorted(
                (offsets[other], offsets[other] + sizes[other])
                for other in placed
                if self.buffers[index].meets(self.buffers[other])
            )
            offset = 0
            for start, end in taken:
                if offset + sizes[index] <= start:
                    break
                offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
            offsets[index] = offset
            placed.append(index)
        return offsets, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)

    def to_dict(self, sizes: Iterable[dict[str, int]]) -> dict[str, Any]:
        """JSON types: the symbolic plan, and offsets for each of ``sizes`` (batch, sequence, past)."""
        placed = []
        for symbols in sizes:
            offsets, arena = self.place(**symbols)
            numbers = {"peak_bytes": self.peak(**symbols), "arena_bytes": arena, "cache_bytes": self.cache(**symbols)}
            placed.append({"sizes": symbols, **numbers, "offsets": offsets})
        return {
            "weight_bytes": self.weights,
            "cache_bytes": str(self.cache),
            "peak_bytes": str(self.peak),
            "alignment": ALIGNMENT,
            "buffers": [
                {"tensors": list(b.tensors), "bytes": str(b.bytes), "first": b.first, "last": b.last}
                for b in self.buffers
            ],
            "written_to_cache": list(self.cached),
            "placed": placed,
        }


def plan_memory(graph: Graph) -> MemoryPlan:
    """Lay the activations of a graph out in one arena.

    Views share the buffer of what they move; an operation writes over an input that nothing reads later, where its
    arithmetic allows it and the sizes are equal. Constants and cached tokens are outside the arena.
    """
    written = {op.output: index for index, op in enumerate(graph.ops)} | dict.fromkeys(graph.inputs, -1)
    last = dict(written)
    for index, op in enumerate(graph.ops):
        last |= {name: index for name in op.inputs if name in written}
    last |= dict.fromkeys(graph.outputs, len(graph.ops))

    root: dict[str, str] = {}  # tensor -> the first tensor of its buffer
    until: dict[str, int] = {}  # first tensor -> last use of the buffer so far
    cached = {name for op in graph.ops if op.kind == "concat" for name in op.inputs}
    cached |= {op.output for op in graph.ops if op.kind == "concat"}

    def use(name: str, of: str) -> None:
        root[name] = of
        until[of] = max(until.get(of, -1), last[name])

    for name in graph.inputs:
        use(name, name)
    for index, op in enumerate(graph.ops):
        use(op.output, _shared(graph, op.output, index, root, until, cached) or op.output)

    in_cache = {root[name] for name in cached}
    members: dict[str, list[str]] = {}
    for name in sorted(root, key=lambda n: written[n]):
        members.setdefault(root[name], []).append(name)
    buffers = tuple(
        Buffer(tuple(names), _bytes(graph, first), written[first], until[first])
        for first, names in members.items()
        if first not in in_cache
    )
    live = (
        sum((b.bytes for b in buffers if b.first <= step <= b.last), Polynomial({})) for step in range(len(graph.ops))
    )
    caches = [op.output for op in graph.ops if op.kind == "concat"]
    return MemoryPlan(
        buffers,
        tuple(op.inputs[1] for op in graph.ops if op.kind == "concat"),
        Maximum.of(live),
        sum((_bytes(graph, name) for name in caches), Polynomial({})),
        sum(_constant_bytes(graph, name) for name in graph.constants),
    )


def _shared(
    graph: Graph, output: str, index: int, root: dict[str, str], until: dict[str, int], cached: set[str]
) -> str | None:
    """First tensor of the buffer that the output of operation ``index`` can use, or None for one of its own."""
    op = graph.ops[index]
    if op.kind in MOVES:
        return root[op.inputs[-1]]
    if op.kind not in _IN_PLACE or output in cached:
        return None
    size = _bytes(graph, output)
    for name in op.inputs:
        first = root.get(name)
        if first is None or name in graph.inputs or any(member in cached for member in _of(root, first)):
            continue
        if until[first] == index and _bytes(graph, first) == size:
            return first
    return None


def _of(root: dict[str, str], first: str) -> list[str]:
    return [name for name, owner in root.items() if owner == first]


def _bytes(graph: Graph, name: str) -> Polynomial:
    value = graph.values[name]
    each = _INPUT_BYTES.get(name, _FLOAT_BYTES)
    if value.encoding is not None:
        each = max(1, value.encoding.grid.bits // 8)
    return Polynomial.size(value.shape, each)


def _constant_bytes(graph: Graph, name: str) -> int:
    """Codes and scales of a constant."""
    value = graph.values[name]
    count = Polynomial.size(value.shape)()
    if value.encoding is None:
        return _FLOAT_BYTES * count
    return -(-count * value.encoding.grid.bits // 8) + 4 * value.encoding.scale.numel()
