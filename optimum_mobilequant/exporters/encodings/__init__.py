"""AIMET encodings: the file that gives a float ONNX graph its integers.

QNN, AI Hub and AIMET read a float graph together with a JSON file that states scale and offset of its tensors by name.
Three layouts of that file are in use; which tool accepts which is in ``docs/qnn.md``.
"""

from .coverage import Coverage, check_coverage
from .layouts import encodings_dict, parse_encodings, write_encodings
from .tensor import TensorEncoding, tensor_encodings, validate

__all__ = [
    "Coverage",
    "TensorEncoding",
    "check_coverage",
    "encodings_dict",
    "parse_encodings",
    "tensor_encodings",
    "validate",
    "write_encodings",
]
