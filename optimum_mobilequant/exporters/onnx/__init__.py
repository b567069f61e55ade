"""ONNX graphs with static integers, made directly from the integer graph."""

from .emit import Emitted, emit
from .form import COVERED, FLOAT, REFERENCE, Form, Layout
from .store import WeightStore
from .types import Record
from .write import export_onnx, write_graphs

__all__ = [
    "COVERED",
    "FLOAT",
    "REFERENCE",
    "Emitted",
    "Form",
    "Layout",
    "Record",
    "WeightStore",
    "emit",
    "export_onnx",
    "write_graphs",
]
