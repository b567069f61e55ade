"""Weights that are stored as something else than a grid of integers: for CPU and GPU, never for an integer graph.

A row of :data:`FORMATS` says how a matrix becomes tensors and back. While tuning, the same two functions round the
rescaled weight, with straight-through gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.adpq import adpq_merge, adpq_split, column_dtype, outlier_count
from ..numerics.affine import group_count, pack_nibbles, unpack_nibbles
from ..numerics.e0m4 import e0m4_decode, e0m4_encode
from ..numerics.packing import pack_planes, unpack_planes_rows
from ..plan import WeightRule
from .quantizer import Mode
from .tunable import TunableWeight

Tensors = dict[str, Tensor]
# name -> (shape, dtype)
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Format:
    """One storage format.

    Args:
        summary: what it is.
        encode: (float32 [out, in], rule, search narrower ranges) -> the tensors of a checkpoint.
        decode: (tensors, row numbers int64 of any shape, columns, rule) -> float32 ``[*rows.shape, columns]``.
        shapes: (out, in, rule) -> shapes and dtypes of the tensors.
    """

    summary: str
    encode: Callable[[Tensor, WeightRule, bool], Tensors]
    decode: Callable[[Tensors, Tensor, int, WeightRule], Tensor]
    shapes: Callable[[int, int, WeightRule], Shapes]


def _e0m4_encode(weight: Tensor, rule: WeightRule, search: bool) -> Tensors:
    return dict(zip(("_bytes", "_scale", "_offset"), e0m4_encode(weight, rule.span, search=search), strict=True))


def _e0m4_decode(held: Tensors, rows: Tensor, columns: int, rule: WeightRule) -> Tensor:
    return e0m4_decode(held["_bytes"][rows], held["_scale"][rows], held["_offset"][rows], rule.span, columns)


def _e0m4_shapes(rows: int, columns: int, rule: WeightRule) -> Shapes:
    groups = (rows, group_count(columns, rule.span))
    return {
        "_bytes": ((rows, -(-columns // 2)), torch.uint8),
        "_scale": (groups, torch.float32),
        "_offset": (groups, torch.float32),
    }


_ADPQ = ("_core", "_step", "_low", "_outlier_columns", "_outlier_codes", "_outlier_scale")


def _adpq_encode(weight: Tensor, rule: WeightRule, search: bool) -> Tensors:
    codes, *rest = adpq_split(weight, rule.bits, rule.span, rule.outliers, search=search)
    core = pack_nibbles(codes) if rule.bits == 4 else pack_planes(codes.to(torch.int16) - 4, 3)
    return dict(zip(_ADPQ, (core, *rest), strict=True))


def _adpq_decode(held: Tensors, rows: Tensor, columns: int, rule: WeightRule) -> Tensor:
    core, step, low, *outliers = (held[name] for name in _ADPQ)
    codes = unpack_nibbles(core[rows], columns) if rule.bits == 4 else unpack_planes_rows(core, rows) + 4
    where, values, scale = (tensor[rows] for tensor in outliers)
    return adpq_merge(codes, step[rows], low[rows], where, values, scale, rule.span)


def _adpq_shapes(rows: int, columns: int, rule: WeightRule) -> Shapes:
    groups, outliers = (rows, group_count(columns, rule.span)), (rows, outlier_count(columns, rule.outliers))
    core = (rows, -(-columns // 2)) if rule.bits == 4 else (3, -(-rows // 8), columns)
    kinds = (torch.uint8, torch.float32, torch.float32, column_dtype(columns), torch.int8, torch.float32)
    return dict(
        zip(_ADPQ, zip((core, groups, groups, outliers, outliers, (rows, 1)), kinds, strict=True), strict=True)
    )


FORMATS: dict[str, Format] = {
    "e0m4": Format("4-bit floats without exponent, in groups", _e0m4_encode, _e0m4_decode, _e0m4_shapes),
    "adpq": Format("3 or 4 bits in groups, outliers apart in 8", _adpq_encode, _adpq_decode, _adpq_shapes),
}


class FormatWeight(nn.Module):
    """A stored matrix in one of :data:`FORMATS`; its buffers are the tensors of the checkpoint.

    Floats stay float32 through casts, as scales of :class:`~.qweight.QWeight` do.
    """

    generation = 0  # as of QWeight; nothing is ever packed from these

    def __init__(self, tensors: Tensors, shape: torch.Size, rule: WeightRule):
        super().__init__()
        self.rule = rule
        self.shape = shape
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def empty(cls, shape: torch.Size, rule: WeightRule, device: Any) -> FormatWeight:
        """Placeholder with the right shapes and dtypes, to be filled by a checkpoint loader."""
        rows, columns = shape
        shapes = FORMATS[rule.format].shapes(rows, columns, rule)
        return cls({n: torch.zeros(size, dtype=d, device=device) for n, (size, d) in shapes.items()}, shape, rule)

    def tensors(self) -> Tensors:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self._names}

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized weight (computed in float32)."""
        return self.rows(torch.arange(self.shape[0], device=self.device)).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantized rows, float32 ``[*ids.shape, in]``."""
        return FORMATS[self.rule.format].decode(self.tensors(), ids, self.shape[1], self.rule)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        device: torch.device = getattr(self, self._names[0]).device
        return device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FormatWeight:
        kept = {name: tensor for name, tensor in self.tensors().items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if (now := getattr(self, name)).dtype != torch.float32:
                setattr(self, name, tensor.to(now.device))
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.rule.bits} bits, {self.rule.format}"


class TunableFormat(TunableWeight):
    """A weight of the student that is rounded by one of :data:`FORMATS` instead of a grid. Clipping does not apply.

    ``search``: narrow the ranges of groups for the least squared error.
    """

    search = False

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.mode in (Mode.OFF, Mode.OBSERVE):
            return super().forward(dtype)
        mode, self.mode = self.mode, Mode.OFF
        scaled = super().forward()  # rescaled, with gradients to the transforms
        self.mode = mode
        same = scaled.data_ptr() == self.source.data_ptr()  # no transform: nothing changes from step to step
        if same and self._kept is not None:
            return self._kept.to(dtype)
        rounded = self._round(scaled.detach())
        if same:
            self._kept = rounded
        return (scaled + (rounded - scaled).detach() if scaled.requires_grad else rounded).to(dtype)

    @torch.no_grad()
    def tensors(self) -> Tensors:
        """The tensors of the folded weight."""
        return FORMATS[self.rule.format].encode(self.folded(), self.rule, self.search)

    def _round(self, weight: Tensor) -> Tensor:
        chosen = FORMATS[self.rule.format]
        tensors = chosen.encode(weight, self.rule, self.search)
        return chosen.decode(tensors, torch.arange(len(weight), device=weight.device), weight.shape[1], self.rule)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        raise RuntimeError(f"a weight in the format {self.rule.format} has no integer codes on a grid")
