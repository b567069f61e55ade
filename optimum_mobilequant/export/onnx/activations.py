"""Emitters of activation functions. Adding one is adding a row to ``ACTIVATIONS``."""

from __future__ import annotations

from collections.abc import Callable

from ...graph import Op
from .emit import Emitter
from .types import UNIT


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
