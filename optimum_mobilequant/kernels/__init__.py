"""Kernels for integer linear layers: a table of backends, the choice among them, and torch operators.

``prepare(codes, scale, ...)`` packs a layer for the fastest backend of this machine; the result is called with codes.
What is stored stays :class:`~..nn.qweight.QWeight`, the same for every machine.
"""

from .layer import IntegerLinear, prepare
from .registry import BACKENDS, Backend, Choice, choose
from .spec import LinearSpec, Output

__all__ = ["BACKENDS", "Backend", "Choice", "IntegerLinear", "LinearSpec", "Output", "choose", "prepare"]
