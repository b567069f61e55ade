"""Modules that replace a transformers model's own: linears, norms, embedding, activation, attention."""

from .modules import QuantActivation, QuantEmbedding, QuantLinear, QuantNorm
from .quantizer import Mode, Quantizer, quantizers_of, set_mode
from .qweight import QWeight
from .swap import swap

__all__ = [
    "Mode",
    "QWeight",
    "QuantActivation",
    "QuantEmbedding",
    "QuantLinear",
    "QuantNorm",
    "Quantizer",
    "quantizers_of",
    "set_mode",
    "swap",
]
