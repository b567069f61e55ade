"""A constant added to all rotated keys of a layer: attention does not see it, the keys' range does.

A vector c that is added to every key of a head adds q·c to all scores of a query, and a softmax takes no notice of
that. So keys may be moved to where their static range is smallest. Keys that rotate slowly have a mean far from 0 (the
key outliers of KIVI, Liu et al. 2024; SageAttention, Zhang et al. 2024, subtracts the mean at run time); here the
middle of each channel's calibrated range is taken off. It cannot be merged into the projection, whose bias would turn
with the position: it is one more term of the rotation's sum, or one addition for an exporter.

On integers the constant has 16-bit codes whose step is :func:`..numerics.shift_step` of the key's own, so that the
rotation's accumulator takes it without rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import Grid, quantize
from ..numerics.integer_elementwise import shift_step
from .prefix import carried
from .quantizer import Quantizer

SHIFT_GRID = Grid(16, signed=True)


class KeyShift(nn.Module, ABC):
    """The constant of one attention layer.

    Args:
        key_path: path from the attention of the module whose output is rotated: the key projection or the keys' norm.
    """

    def __init__(self, key_path: str):
        super().__init__()
        self.key_path = key_path

    def rotated_from(self, attention: nn.Module) -> Quantizer:
        """The quantizer of what is rotated."""
        return attention.get_submodule(f"{self.key_path}.output")  # type: ignore[return-value]

    @abstractmethod
    def value(self, attention: nn.Module) -> Tensor:
        """Float ``[kv_heads, 1, head_dim]``, to be added to rotated keys."""


class PackedShift(KeyShift):
    """Buffer: ``codes``, int16 ``[kv_heads, head_dim]``."""

    codes: Tensor

    def __init__(self, codes: Tensor, key_path: str):
        super().__init__(key_path)
        self.register_buffer("codes", codes)

    def value(self, attention: nn.Module) -> Tensor:
        return (self.codes.float() * shift_scale(self.rotated_from(attention)))[:, None]


class TunableShift(KeyShift):
    """The constant of a student, carried through the transforms of the keys at each use.

    Args:
        source: float32 ``[kv_heads, head_dim]``, in the float model's basis; never written.
    """

    source: Tensor

    def __init__(self, source: Tensor, key_path: str):
        super().__init__(key_path)
        object.__setattr__(self, "source", source)

    def value(self, attention: nn.Module) -> Tensor:
        module: Any = attention.get_submodule(self.key_path)
        return carried(module.weight, self.source[:, None])

    @torch.no_grad()
    def pack(self, attention: nn.Module) -> Tensor:
        """Codes as :class:`PackedShift` holds them."""
        scale = shift_scale(self.rotated_from(attention))
        return quantize(self.value(attention)[:, 0], scale, torch.zeros_like(scale, dtype=torch.int32), SHIFT_GRID)


def shift_scale(key: Quantizer) -> Tensor:
    """Scale of the constant's codes, float32 0-dim, from what is rotated."""
    return key.scale * shift_step(key.spec.bits)


def remove_shift(model: nn.Module) -> None:
    """Take the constants off: the model computes the same, up to rounding."""
    for module in model.modules():
        if isinstance(getattr(module, "key_shift", None), KeyShift):
            del module.key_shift
