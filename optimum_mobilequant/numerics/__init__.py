"""The package's one arithmetic: scale, zero point, rounding. Tuning, packing, inference and export import it."""

from .fake import fake_quantize, fake_quantize_learned, fake_quantize_open
from .fake_weight import fake_quantize_offset, fake_quantize_weight
from .qparams import Grid, affine_qparams, dequantize, quantize, weight_qparams

__all__ = [
    "Grid",
    "affine_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_offset",
    "fake_quantize_open",
    "fake_quantize_weight",
    "quantize",
    "weight_qparams",
]
