"""Kernels for integer linear layers: a table of backends, the choice among them, and torch operators.

``prepare(codes, scale, ...)`` packs a layer for the fastest backend of this machine; the result is called with codes.
``prepare_weight_only`` does it for 4-bit weights and float activations. What is stored stays
:class:`~..nn.qweight.QWeight`, the same for every machine.
"""

from .layer import IntegerLinear, prepare
from .registry import BACKENDS, Backend, Choice, choose
from .spec import LinearSpec, Output
from .weight_only import WeightOnlyLinear, prepare_weight_only

__all__ = [
    "BACKENDS", "Backend", "Choice", "IntegerLinear", "LinearSpec", "Output", "WeightOnlyLinear", "choose", "prepare",
    "prepare_weight_only",
]  # fmt: skip
