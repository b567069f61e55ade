"""How each kind of operation is written in ONNX. Adding a kind is adding a row to ``EMITTERS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...graph import Encoding, Op
from ...graph.ir import Dim
from . import attention
from .activations import activation
from .emit import Emitter
from .types import REFINEMENT, refined


def embedding(e: Emitter, op: Op) -> None:
    ids, table = op.inputs
    if e.form.qdq and not e.form.cover_all and e.encoding(op.output) is not None:
        # The table holds the output's own codes: looking them up and dequantizing n numbers a token is all.
        e.result_codes(op, "Gather", [e.held.codes(table), e.read[ids]], axis=0)
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


def add(e: Emitter, op: Op) -> None:
    e.result(op, "Add", e.inputs_of(op))


def multiply(e: Emitter, op: Op) -> None:
    e.result(op, "Mul", e.inputs_of(op))


EMITTERS: dict[str, Callable[[Emitter, Op], None]] = {
    "embedding": embedding,
    "norm": norm,
    "linear": linear,
    "split_heads": attention.split_heads,
    "merge_heads": attention.merge_heads,
    "rope": attention.rope,
    "concat": attention.concat,
    "scores": attention.scores,
    "mask": attention.mask,
    "softmax": attention.softmax,
    "context": attention.context,
    "add": add,
    "activation": activation,
    "multiply": multiply,
}
