"""Emitters of attention: heads, rotation, cache, scores, mask, context."""

from __future__ import annotations

import numpy as np

from ...graph import Encoding, Op
from ...graph.ir import SEQUENCE, TOTAL, Dim
from .emit import Emitter
from .even import Like, computed, even, sure
from .types import of_product, of_rotation, refined


def split_heads(e: Emitter, op: Op) -> None:
    source = op.inputs[0]
    batch, heads, sequence, size = e.shape(op.output)
    split = e.reshape(op, "split", e.read[source], (batch, sequence, heads, size), source)
    e.result(op, "Transpose", [split], perm=[0, 2, 1, 3])


def merge_heads(e: Emitter, op: Op) -> None:
    source = op.inputs[0]
    batch, heads, sequence, size = e.shape(source)
    turned = e.inner(
        op, "transposed", "Transpose", [e.read[source]], source, (batch, sequence, heads, size), perm=[0, 2, 1, 3]
    )
    e.reshape(op, None, turned, e.shape(op.output), source)


def rope(e: Emitter, op: Op) -> None:
    """Pairs (i, i + r/2) turn by one angle: two products for each half, one difference, one sum; behind them the
    shift, ``[heads, 1, D]``, where there is one."""
    source, cos, sin, *shift = op.inputs
    r = int(op.attributes["rotary_dims"])
    batch, heads, sequence, size = e.shape(op.output)
    assert isinstance(size, int)
    (x, *_), (like, *_), late = even(e, op, (source, cos, sin))
    onto: Like = refined(sure(e, op.output)) if late else op.output
    if shift:  # before it the sums need not lie in the output's range
        onto = of_rotation(e.encoding(source))

    def part(name: str, start: int, end: int) -> str:
        bounds = [
            e.held.small(f"{op.name}.{name}.{key}", np.array([number]))
            for key, number in (("start", start), ("end", end), ("axis", 3))
        ]
        return e.inner(op, name, "Slice", [x, *bounds], like, (batch, heads, sequence, end - start))

    halves = {"first": part("first", 0, r // 2), "second": part("second", r // 2, r)}
    half, rotated = (batch, heads, sequence, r // 2), []
    for name, kind, terms in (
        ("rotated_first", "Sub", (("first", cos, "cos"), ("second", sin, "sin"))),
        ("rotated_second", "Add", (("second", cos, "cos"), ("first", sin, "sin"))),
    ):
        bound = of_product(e.encoding(source), e.encoding(cos))
        products = [
            e.inner(op, f"{term}_{short}", "Mul", [halves[term], e.read[table]], bound, half)
            for term, table, short in terms
        ]
        rotated.append(e.inner(op, name, kind, products, onto, half))
    if r < size:
        passed = part("passed", r, size)
        if e.form.converts and e.encoding(op.output) is not None:  # what is joined must be on one grid
            grid = onto if isinstance(onto, Encoding) else sure(e, op.output)
            passed = e.converted(passed, f"{op.name}.passed_rounded", grid, op.output)
        rotated.append(passed)
    if not shift:
        computed(e, op, "Concat", rotated, late, axis=3)
        return
    # The shift has 16 bits, as the tables have, so what is late behind them is late here.
    joined = e.inner(op, "rotated", "Concat", rotated, onto, (batch, heads, sequence, size), axis=3)
    computed(e, op, "Add", [joined, e.constant(*shift)], late)


def concat(e: Emitter, op: Op) -> None:
    """Cached and new tokens. The new slice alone leaves the graph: the caller writes it into its static buffer."""
    past, new = op.inputs
    is_key = past.startswith("past_key")
    if e.layout.dynamic:
        kind, more, axis = "Identity", {}, 2
    else:
        kind, more, axis = "Transpose", {"perm": [1, 0, 3, 2] if is_key else [1, 0, 2, 3]}, 3 if is_key else 2
    shapes = [e.layout.cache(e.graph, is_key, length) for length in (SEQUENCE, TOTAL)]
    fresh = e.node(kind, [e.read[new]], e.border[new], shapes[0], e.encoding(new), "move", new, **more)
    parts = [e.read[past], fresh]
    e.read[op.output] = e.node("Concat", parts, op.output, shapes[1], e.encoding(new), "move", new, axis=axis)


def scores(e: Emitter, op: Op) -> None:
    query, keys = op.inputs
    held = e.read[keys]
    if e.layout.dynamic:
        batch, count, total, size = e.layout.cache(e.graph, True, TOTAL)
        shape = (batch, count, size, total)
        held = e.inner(op, "keys", "Transpose", [held], keys, shape, perm=[0, 1, 3, 2])
    _product(e, op, query, held)


def context(e: Emitter, op: Op) -> None:
    probabilities, values = op.inputs
    _product(e, op, probabilities, e.read[values])


def _product(e: Emitter, op: Op, source: str, other: str) -> None:
    """One product for each KV head: of [B,H,S,n] the query heads of a group lie one after the other, as its rows."""
    (x,), (like,), late = even(e, op, [source])
    rows = e.reshape(op, "rows", x, _grouped(e, op, e.shape(source)), like)
    computed(e, op, "MatMul", [rows, other], late, _grouped(e, op, e.shape(op.output)))


def _grouped(e: Emitter, op: Op, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    batch, _, sequence, last = shape
    count, groups = e.graph.facts["kv_heads"], int(op.attributes["groups"])
    rows = groups * sequence if isinstance(sequence, int) else f"{groups}*{sequence}"
    return (batch, count, rows, last) if e.layout.dynamic else (count, 1, rows, last)


def mask(e: Emitter, op: Op) -> None:
    scores, hidden = e.inputs_of(op)
    before, after = e.encoding(op.inputs[0]), e.encoding(op.output)
    if e.form.converts and before is not None and after is not None and not before.same_as(after):
        # 8 + 16 bits is off by several 16-bit codes, each a whole step of the scores here; 16 + 16 is exact.
        scores = e.converted(scores, f"{op.name}.wide", after, op.inputs[0])
    e.result(op, "Add", [scores, hidden])


def softmax(e: Emitter, op: Op) -> None:
    inputs, _, late = even(e, op, op.inputs)
    computed(e, op, "Softmax", inputs, late, axis=-1)
