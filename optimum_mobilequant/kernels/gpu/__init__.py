"""Triton backend: integer tensor cores of NVIDIA GPUs from compute capability 8.0 on.

Triton is imported when a layer first runs; nothing else of the package needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics.groups import spread
from ..reference import pack_multiplier
from ..spec import Call, LinearSpec, Packed, Weights
from . import layout
from .device import interpreted, unusable
from .workspace import workspace_of

# 16 * 8 * 255 summed over more columns could leave int32 before the 16 is divided out.
_MOST_COLUMNS = 65793


def available() -> str | None:
    """None, or why the GPUs of this machine cannot be used."""
    return unusable()


def supports(spec: LinearSpec) -> str | None:
    """Why this backend cannot run a layer, or None."""
    if spec.device != "cuda" and not (spec.device == "cpu" and interpreted()):
        return "it computes on NVIDIA GPUs"
    if spec.in_features > _MOST_COLUMNS:
        return f"it takes up to {_MOST_COLUMNS} input features, not {spec.in_features}"
    if spec.activation_bits == 16 and spec.output.is_totals:
        return "totals of 16-bit activations leave int32"
    return None


def pack(spec: LinearSpec, weights: Weights) -> Packed:
    """Weights in the kernels' layout; all that is constant in a total in the bias (int64 for 16-bit activations)."""
    if spec.activation_bits == 8 and weights.largest_total(spec) >= 2**31:
        raise ValueError('the sums of this layer can leave int32; give backend="reference"')
    bias = weights.folded_bias()
    row_sum = weights.codes.sum(1, dtype=torch.int64)
    # The kernels multiply codes less 128; 16-bit codes come as two such bytes, high * 256 + low.
    bias += row_sum * (128 if spec.activation_bits == 8 else 128 * 257)
    if spec.activation_bits == 8:  # intermediate sums wrap around, their end does not
        bias = ((bias + 2**31) % 2**32 - 2**31).to(torch.int32)
    if weights.groups is not None:
        packed = layout.pack_grouped(weights.groups.nibbles, weights.groups.multiplier, spec.group)
    else:
        packed = layout.pack_nibbles(weights.codes) if spec.weight_bits == 4 else layout.pack_bytes(weights.codes)
    zero = None if weights.zero_point is None else weights.zero_point.to(torch.int32).contiguous()
    workspace_of(weights.codes.device)  # made now: a CUDA graph may be captured before the layer is called
    return Packed(packed, bias, pack_multiplier(weights.real_factor(spec.output), spec.output), zero, 0)


def unpack(spec: LinearSpec, packed: Packed) -> Tensor:
    """The codes that :func:`pack` was given; of a weight with groups their products, as ``Weights.codes``."""
    return _unpacked(spec, packed, slice(spec.out_features))


def unpack_rows(spec: LinearSpec, packed: Packed, rows: Tensor) -> Tensor:
    """Those codes of some output channels, int8 ``[*rows.shape, in]``: what an embedding tied to a head reads."""
    return _unpacked(spec, packed, rows.reshape(-1)).view(*rows.shape, spec.in_features)


def _unpacked(spec: LinearSpec, packed: Packed, rows: Tensor | slice) -> Tensor:
    if spec.group:
        nibbles, multiplier = layout.unpack_grouped(packed.weight, rows, spec.in_features, spec.group)
        return nibbles * spread(multiplier, spec.group, spec.in_features).to(torch.int8)
    weight = packed.weight[:, rows]
    decode = layout.unpack_nibbles if spec.weight_bits == 4 else layout.unpack_bytes
    return decode(weight, weight.shape[1], spec.in_features)


def run(call: Call) -> Tensor:
    """One call: a decode kernel for few rows, a persistent one for many; no synchronization with the host."""
    from .linear import linear, wide_linear

    if call.activation_bits == 16:
        return wide_linear(call.x, call.packed, call.output, call.weight_bits)
    return linear(call.x, call.packed, call.output, call.weight_bits)
