"""Rounding chosen in closed form, layer by layer: GPTQ and Qronos, with MagR before them."""

from .compensate import Compensation, InputMoments, compensate, row_errors
from .magr import project_l1, reduce_magnitude, shrink_maximum
from .sequential import Method, round_layers
from .stage import compensate_rounding

__all__ = [
    "Compensation",
    "InputMoments",
    "Method",
    "compensate",
    "compensate_rounding",
    "project_l1",
    "reduce_magnitude",
    "round_layers",
    "row_errors",
    "shrink_maximum",
]
