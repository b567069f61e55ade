"""Encodings as ONNX states them, and encodings for tensors that the plan does not list."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from ...graph import Encoding, Graph
from ...numerics import Grid, affine_qparams
from .store import Array

# Codes of (bits, signed): ONNX type and numpy type.
CODE_TYPES: dict[tuple[int, bool], tuple[int, type[np.generic]]] = {
    (4, True): (onnx.TensorProto.INT4, np.int8),
    (8, True): (onnx.TensorProto.INT8, np.int8),
    (8, False): (onnx.TensorProto.UINT8, np.uint8),
    (16, False): (onnx.TensorProto.UINT16, np.uint16),
    (32, True): (onnx.TensorProto.INT32, np.int32),
}
WIDE = Grid(16, signed=False)
REFINEMENT = WIDE.qmax // Grid(8, signed=False).qmax
# [0, 1] in 16 bits, of a sigmoid.
UNIT = Encoding(torch.tensor(1.0 / WIDE.qmax), torch.tensor(0, dtype=torch.int32), WIDE)
# The hidden value of the mask is at least this far below 0, as in Qualcomm's graphs.
_LEAST_MASK = 50.0
_MASK_MARGIN = 1.01
# Added to a hidden score where scores are floats: enough for any model, and finite in float16.
FLOAT_HIDDEN = -1000.0


@dataclass(frozen=True)
class Record:
    """One float tensor of an emitted graph.

    Args:
        name: in the ONNX graph.
        encoding: None for a tensor without integers (weight-only models).
        axis: along which the scale changes, in the shape that the ONNX graph uses: the channels of a per-channel
            encoding, the blocked axis of a per-block one; None for one scale. (``encoding`` itself keeps the order of
            the integer graph: [out] or [out, blocks].)
        origin: ``"plan"`` (the plan rounds here), ``"move"`` (moved data, equal codes), ``"derived"`` (inside an
            operation of the plan; the encoding is a proposal), ``"constant"``.
        source: the tensor of the integer graph it is, or belongs to.
    """

    name: str
    encoding: Encoding | None
    axis: int | None
    origin: str
    source: str


def unsigned(encoding: Encoding) -> Encoding:
    """The same values with 16-bit codes shifted to start at 0: no NPU takes signed 16-bit tensors everywhere."""
    if encoding.grid.bits == 16 and encoding.grid.signed:
        return Encoding(encoding.scale, encoding.zero_point - encoding.grid.qmin, WIDE, encoding.block_size)
    return encoding


def code_array(codes: Tensor, encoding: Encoding) -> tuple[int, Array]:
    """ONNX type and numpy array of a tensor's codes, shifted as :func:`unsigned` shifts the encoding."""
    stated = unsigned(encoding)
    kind, dtype = CODE_TYPES[stated.grid.bits, stated.grid.signed]
    shift = 0 if stated is encoding else -encoding.grid.qmin
    wide = codes.to(torch.int32) + shift if shift else codes
    return kind, wide.numpy().astype(dtype, copy=False)


def limits(encoding: Encoding) -> tuple[float, float]:
    """Smallest and largest value of a per-tensor encoding."""
    zero, scale = int(encoding.zero_point), float(encoding.scale)
    return (encoding.grid.qmin - zero) * scale, (encoding.grid.qmax - zero) * scale


def refined(encoding: Encoding) -> Encoding:
    """16-bit grid over the range of an 8-bit one, :data:`REFINEMENT` steps for each of its own, so its values are on
    it."""
    return Encoding(encoding.scale / REFINEMENT, encoding.zero_point * REFINEMENT, WIDE)


def over(low: float, high: float) -> Encoding:
    """16-bit encoding over [low, high]."""
    return Encoding(*affine_qparams(torch.tensor(low), torch.tensor(high), WIDE), WIDE)


def of_product(a: Encoding | None, b: Encoding | None) -> Encoding | None:
    """16-bit encoding that holds every product of two tensors' values."""
    if a is None or b is None:
        return None
    ends = [x * y for x in limits(a) for y in limits(b)]
    return over(min(ends), max(ends))


def of_rotation(x: Encoding | None) -> Encoding | None:
    """16-bit encoding that holds a tensor's values, turned in pairs by any angle."""
    if x is None:
        return None
    bound = math.sqrt(2) * max(map(abs, limits(x)))
    return over(-bound, bound)


def mask_encoding(graph: Graph) -> Encoding | None:
    """uint16 encoding of the additive mask: the highest code is 0 (visible), code 0 is the hidden value. None where
    scores are floats.

    The hidden value reaches across the widest grid of masked scores, so that any score plus it saturates at that
    grid's lowest code, which is what the integer graph gives a hidden position.
    """
    reach = _LEAST_MASK
    for op in graph.ops:
        if op.kind == "mask":
            encoding = graph.values[op.output].encoding
            if encoding is None:
                return None
            low, high = limits(encoding)
            reach = max(reach, (high - low) * _MASK_MARGIN)
    return Encoding(torch.tensor(reach / WIDE.qmax), torch.tensor(WIDE.qmax, dtype=torch.int32), WIDE)
