"""Running a quantized model on integers: which kernels compute it, and what they own."""

from .backend import backend_of, served, set_backend, simulated
from .linear import PackedLinear, Served
from .survey import survey

__all__ = ["PackedLinear", "Served", "backend_of", "served", "set_backend", "simulated", "survey"]
