"""Emitters of activation functions. Adding one is adding a row to ``ACTIVATIONS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...graph import Encoding, Op
from .emit import Emitter
from .even import bits, computed, even, widened
from .types import UNIT, over


def activation(e: Emitter, op: Op) -> None:
    name = str(op.attributes["function"])
    if name not in ACTIVATIONS:
        raise ValueError(f'activation "{name}" ({op.name}) has no ONNX form here; known: {", ".join(ACTIVATIONS)}')
    ACTIVATIONS[name](e, op)


def _one(kind: str, grid: Encoding | None = None, **attributes: Any) -> Callable[[Emitter, Op], None]:
    """A function that is one operator; ``grid``: the only 16-bit one on which the NPU computes it right."""

    def write(e: Emitter, op: Op) -> None:
        inputs, _, late = even(e, op, op.inputs)
        computed(e, op, kind, inputs, late, grid=grid, **attributes)

    return write


def _silu(e: Emitter, op: Op) -> None:
    (source,) = op.inputs
    coded = bits(e, source) is not None
    wide = e.form.converts and coded  # an 8-bit gate would be too coarse
    x = widened(e, source)[0] if wide else e.read[source]
    gate = e.inner(op, "sigmoid", "Sigmoid", [x], UNIT if coded else None, e.shape(op.output))
    computed(e, op, "Mul", [x, gate], wide and bits(e, op.output) == 8)


# Key of transformers' ACT2FN -> emitter.
ACTIVATIONS: dict[str, Callable[[Emitter, Op], None]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _one("Gelu"),
    "gelu_pytorch_tanh": _one("Gelu", approximate="tanh"),
    "gelu_new": _one("Gelu", approximate="tanh"),
    "gelu_fast": _one("Gelu", approximate="tanh"),
    "relu": _one("Relu"),
    "sigmoid": _one("Sigmoid", UNIT),
    "tanh": _one("Tanh", over(-1.0, 1.0)),
}
