"""How each kind of operation is written in ONNX. Adding a kind is adding a row to ``EMITTERS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...graph import Op
from . import attention, even
from .activations import activation
from .emit import Emitter
from .types import REFINEMENT


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
    like: even.Like = op.inputs[0]
    batch, *middle, size = e.shape(op.output)
    late = e.form.converts and even.bits(e, op.output) == 8
    if e.form.converts and even.bits(e, op.inputs[0]) is not None:
        x, like = even.widened(e, op.inputs[0])  # the gain has 16 bits
    if len(middle) == 1 or e.layout.dynamic:
        even.computed(e, op, kind, [x, gain, *bias], late, **more)
        return
    # Heads as rows: after a norm of four axes the NPU's rotation reads its tables at wrong places.
    shape = (batch, math.prod(d for d in middle if isinstance(d, int)), size)
    rows = e.reshape(op, "rows", x, shape, like)
    even.computed(e, op, kind, [rows, gain, *bias], late, shape, **more)


def linear(e: Emitter, op: Op) -> None:
    source, name, *bias = op.inputs
    weight = e.constant(name, transposed=True)
    # 4-bit weights times 16-bit codes lose the low bits on the NPU, so a wide input has to fill its range.
    (x,), (like,), late = even.even(e, op, [source])
    if not bias:
        even.computed(e, op, "MatMul", [x, weight], late)
        return
    # The NPU reads a bias on the scale of the accumulator, input scale * weight scale, whatever its own.
    added = e.constant(bias[0], steps=1 if x == e.read[source] else REFINEMENT)
    if e.layout.dynamic:
        product = e.inner(op, "product", "MatMul", [x, weight], None, e.shape(op.output))
        e.result(op, "Add", [product, added])
    else:  # one operator with the bias in its accumulator; it takes matrices only
        _, rows, size = e.shape(source)
        flat = e.reshape(op, "rows", x, (rows, size), like)
        even.computed(e, op, "Gemm", [flat, weight, added], late, (rows, e.shape(op.output)[2]))


def add(e: Emitter, op: Op) -> None:
    _elementwise(e, op, "Add")


def multiply(e: Emitter, op: Op) -> None:
    _elementwise(e, op, "Mul")


def _elementwise(e: Emitter, op: Op, kind: str) -> None:
    inputs, _, late = even.even(e, op, op.inputs)
    even.computed(e, op, kind, inputs, late)


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
