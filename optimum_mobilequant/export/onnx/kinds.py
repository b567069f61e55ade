"""How each kind of operation is written in ONNX. Adding a kind is adding a row to ``EMITTERS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...graph import Encoding, Op
from ...graph.ir import SEQUENCE, TOTAL, Dim
from .emit import Emitter
from .types import REFINEMENT, UNIT, of_product, refined


def embedding(e: Emitter, op: Op) -> None:
    ids, table = op.inputs
    if e.form.qdq and not e.form.cover_all and e.encoding(op.output) is not None:
        # The table holds the output's own codes: looking them up and dequantizing n numbers a token is all.
        e.result_codes(op, "Gather", [e.codes(table), e.read[ids]], axis=0)
    else:
        e.result(op, "Gather", [e.constant(table), e.read[ids]], axis=0)


def norm(e: Emitter, op: Op) -> None:
    x, gain, *bias = e.inputs_of(op)
    more: dict[str, Any] = {"axis": -1, "epsilon": float(op.attributes["eps"])}
    is_layer = bool(op.attributes["centre"])
    if bias and not is_layer:
        raise ValueError(f"{op.name} is an RMS norm with a bias, which has no ONNX operator")
    kind = "LayerNormalization" if is_layer else "RMSNormalization"
    source, grid, late = op.inputs[0], e.encoding(op.inputs[0]), False
    batch, *middle, size = e.shape(op.output)
    if e.form.converts and (bits := _bits(e, op)) is not None:
        # With a 16-bit gain the NPU takes: RMS norm 16 -> 16, 16 -> 8 (wrong if over heads) and 8 -> 16 bits,
        # LayerNorm 16 -> 16 alone.
        if bits[0] == 8 and is_layer:
            grid = refined(_sure(e, source))
            x = e.converted(x, f"{source}.wide", grid, source)
        late = bits[1] == 8 and (bits[0] == 8 or is_layer or len(middle) > 1)
    if len(middle) == 1 or e.layout.dynamic:
        _computed(e, op, kind, [x, gain, *bias], late, **more)
        return
    # Heads as rows: after a norm of four axes the NPU's rotation reads its tables at wrong places.
    shape = (batch, math.prod(d for d in middle if isinstance(d, int)), size)
    rows = e.reshape(op, "rows", x, shape, grid)
    _computed(e, op, kind, [rows, gain, *bias], late, shape, **more)


def linear(e: Emitter, op: Op) -> None:
    source, name, *bias = op.inputs
    x, weight, grid = e.read[source], e.constant(name, transposed=True), e.encoding(source)
    widens = late = False
    if e.form.converts and (bits := _bits(e, op)) is not None:
        # The NPU multiplies by constant weights at equal bits of input and output. 4-bit weights times 16-bit codes
        # lose the low bits there, so a wide input has to fill its range.
        widens, late = bits == (8, 16), bits == (16, 8)
    if widens:
        grid = refined(_sure(e, source))
        x = e.converted(x, f"{source}.wide", grid, source)
    if not bias:
        _computed(e, op, "MatMul", [x, weight], late)
        return
    # The NPU reads a bias on the scale of the accumulator, input scale * weight scale, whatever its own.
    added = e.constant(bias[0], steps=REFINEMENT if widens else 1)
    if e.layout.dynamic:
        product = e.inner(op, "product", "MatMul", [x, weight], None, e.shape(op.output))
        e.result(op, "Add", [product, added])
    else:  # one operator with the bias in its accumulator; it takes matrices only
        _, rows, size = e.shape(source)
        flat = e.reshape(op, "rows", x, (rows, size), grid)
        _computed(e, op, "Gemm", [flat, weight, added], late, (rows, e.shape(op.output)[2]))


def _computed(
    e: Emitter,
    op: Op,
    kind: str,
    inputs: list[str],
    late: bool,
    shape: tuple[Dim, ...] | None = None,
    **attributes: Any,
) -> None:
    """The operation's output by one node.

    Args:
        late: in 16 bits over the output's range first, then on the output's own 8-bit grid.
        shape: of the node's result, where it is not the output's.
    """
    if shape is None and not late:
        e.result(op, kind, inputs, **attributes)
        return
    grid = refined(_sure(e, op.output)) if late else e.encoding(op.output)
    made = e.inner(op, "product", kind, inputs, grid, shape or e.shape(op.output), **attributes)
    if shape is None:
        e.result(op, None, [made])
        return
    if late:
        made = e.converted(made, f"{op.name}.narrow", _sure(e, op.output), op.output)
    e.reshape(op, None, made, e.shape(op.output), e.encoding(op.output))


def _bits(e: Emitter, op: Op) -> tuple[int, int] | None:
    """Bits of the first input and of the output, or None where they are floats."""
    x, y = e.encoding(op.inputs[0]), e.encoding(op.output)
    return None if x is None or y is None else (x.grid.bits, y.grid.bits)


def _sure(e: Emitter, value: str) -> Encoding:
    encoding = e.encoding(value)
    assert encoding is not None
    return encoding


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
    """Pairs (i, i + r/2) turn by one angle: two products for each half, one difference, one sum."""
    source, cos, sin = op.inputs
    x, r = e.read[source], int(op.attributes["rotary_dims"])
    batch, heads, sequence, size = e.shape(op.output)
    assert isinstance(size, int)

    def part(name: str, start: int, end: int) -> str:
        bounds = [
            e.initializer(f"{op.name}.{name}.{key}", np.array([number]))
            for key, number in (("start", start), ("end", end), ("axis", 3))
        ]
        return e.inner(op, name, "Slice", [x, *bounds], source, (batch, heads, sequence, end - start))

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
        rotated.append(e.inner(op, name, kind, products, op.output, half))
    if r < size:
        rotated.append(part("passed", r, size))
    e.result(op, "Concat", rotated, axis=3)


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
    rows, held = _rows(e, op, query), e.read[keys]
    if e.layout.dynamic:
        batch, count, total, size = e.layout.cache(e.graph, True, TOTAL)
        shape = (batch, count, size, total)
        held = e.inner(op, "keys", "Transpose", [held], keys, shape, perm=[0, 1, 3, 2])
    _product(e, op, rows, held)


def context(e: Emitter, op: Op) -> None:
    probabilities, values = op.inputs
    _product(e, op, _rows(e, op, probabilities), e.read[values])


def _rows(e: Emitter, op: Op, source: str) -> str:
    """[B,H,S,n] as rows of one product for each KV head: the query heads of a group lie one after the other."""
    return e.reshape(op, "rows", e.read[source], _grouped(e, op, e.shape(source)), source)


def _product(e: Emitter, op: Op, rows: str, other: str) -> None:
    shape = e.shape(op.output)
    product = e.inner(op, "product", "MatMul", [rows, other], op.output, _grouped(e, op, shape))
    e.reshape(op, None, product, shape, op.output)


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
    e.result(op, "Softmax", e.inputs_of(op), axis=-1)


def add(e: Emitter, op: Op) -> None:
    e.result(op, "Add", e.inputs_of(op))


def multiply(e: Emitter, op: Op) -> None:
    e.result(op, "Mul", e.inputs_of(op))


def activation(e: Emitter, op: Op) -> None:
    name = str(op.attributes["function"])
    if name not in ACTIVATIONS:
        raise ValueError(f'activation "{name}" ({op.name}) has no ONNX form here; known: {", ".join(ACTIVATIONS)}')
    ACTIVATIONS[name](e, op)


def _one(kind: str, **attributes: str) -> Callable[[Emitter, Op], None]:
    def write(e: Emitter, op: Op) -> None:
        e.result(op, kind, e.inputs_of(op), **attributes)

    return write


def _silu(e: Emitter, op: Op) -> None:
    (x,) = e.inputs_of(op)
    gate = e.inner(
        op, "sigmoid", "Sigmoid", [x], None if e.encoding(op.inputs[0]) is None else UNIT, e.shape(op.output)
    )
    e.result(op, "Mul", [x, gate])


# Key of transformers' ACT2FN -> emitter.
ACTIVATIONS: dict[str, Callable[[Emitter, Op], None]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _one("Gelu"),
    "gelu_pytorch_tanh": _one("Gelu", approximate="tanh"),
    "gelu_new": _one("Gelu", approximate="tanh"),
    "gelu_fast": _one("Gelu", approximate="tanh"),
    "relu": _one("Relu"),
    "sigmoid": _one("Sigmoid"),
    "tanh": _one("Tanh"),
}
EMITTERS: dict[str, Callable[[Emitter, Op], None]] = {
    "embedding": embedding,
    "norm": norm,
    "linear": linear,
    "split_heads": split_heads,
    "merge_heads": merge_heads,
    "rope": rope,
    "concat": concat,
    "scores": scores,
    "mask": mask,
    "softmax": softmax,
    "context": context,
    "add": add,
    "activation": activation,
    "multiply": multiply,
}
