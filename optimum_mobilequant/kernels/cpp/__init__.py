"""Compiled CPU backend: this package's own kernels for 8- and 4-bit weights, compiled on first use."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..reference import finish, pack_multiplier
from ..spec import Call, LinearSpec, Output, Packed, Weights
from .build import BuildError, build_library
from .library import Library

_PANEL = 64  # output channels of a panel of the packed weights (linear.h)
# 16 * code * 255 summed over more columns could leave int32 before the 16 is divided out.
_MOST_COLUMNS = 65793


@cache
def library() -> Library:
    """The kernels, compiled if they are not in the cache.

    Raises:
        BuildError: they cannot be compiled, stored, loaded or trusted here; the message says why.
    """
    return Library(build_library())


@cache
def available() -> str | None:
    """Why this backend cannot be used here, or None. Compiles the kernels on the first call (some seconds)."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def supports(spec: LinearSpec) -> str | None:
    """Why this backend cannot run a layer, or None."""
    if spec.device != "cpu":
        return "it computes on the CPU"
    if spec.in_features > _MOST_COLUMNS:
        return f"it takes up to {_MOST_COLUMNS} input features, not {spec.in_features}"
    if spec.activation_bits == 16 and spec.output.is_totals:
        return "totals of 16-bit activations leave int32"
    return None


def pack(spec: LinearSpec, weights: Weights) -> Packed:
    """Weights in the kernels' layout (half a byte for each 4-bit weight); the input's zero point in the bias."""
    if spec.activation_bits == 8 and weights.largest_total(spec) >= 2**31:
        raise ValueError('the sums of this layer can leave int32; give backend="reference"')
    bias = weights.folded_bias()
    if spec.activation_bits == 8:  # intermediate sums wrap around, their end does not
        bias = ((bias + 2**31) % 2**32 - 2**31).to(torch.int32)
    packed = library().pack(weights.codes.contiguous(), spec.weight_bits)
    zero = None if weights.zero_point is None else weights.zero_point.to(torch.int32).contiguous()
    return Packed(packed, bias, pack_multiplier(weights.real_factor(spec.output), spec.output), zero, 0)


def unpack(spec: LinearSpec, packed: Packed) -> Tensor:
    """The codes that :func:`pack` was given."""
    return unpack_rows(spec, packed, torch.arange(spec.out_features))


def unpack_rows(spec: LinearSpec, packed: Packed, rows: Tensor) -> Tensor:
    """Some rows of the codes: int8 ``[*rows.shape, in]``."""
    panels = -(-spec.out_features // _PANEL)
    data = packed.weight[4 * _PANEL * panels :].view(panels, -1, _PANEL, 4)[rows // _PANEL, :, rows % _PANEL]
    if spec.weight_bits == 4:  # the high nibble is the earlier group of four columns
        signed = data.view(torch.int8)
        data = torch.stack([signed >> 4, (signed << 4) >> 4], dim=-2)
    return data.reshape(*rows.shape, -1)[..., : spec.in_features].view(torch.int8).contiguous()


def run(call: Call) -> Tensor:
    """One call of the kernel; for 16-bit activations two byte planes of rows in one call."""
    if call.activation_bits == 16:
        return _wide(call)
    return library().linear(call.x, call.packed, call.output, call.weight_bits)


def _wide(call: Call) -> Tensor:
    """``sum_k x * w`` with ``x = 256 * high + low``: both planes are uint8 rows of the same product."""
    packed = call.packed
    x = call.x.reshape(-1, call.x.shape[-1])
    if call.output.qmax and call.output.dtype in (torch.int32, torch.float32):
        return library().linear_wide(x.contiguous(), packed, call.output, call.weight_bits)
    planes = torch.cat([x >> 8, x & 0xFF]).to(torch.uint8)
    no_bias = torch.zeros(call.out_features, dtype=torch.int32, device="cpu")
    plain = Packed(packed.weight, no_bias, packed.multiplier, None, 0)
    parts = library().linear(planes, plain, Output.totals(), call.weight_bits)
    high, low = parts.to(torch.int64).chunk(2)
    total = high * 256 + low + packed.bias
    if packed.weight_zero_point is not None:
        total -= x.sum(-1, keepdim=True, dtype=torch.int64) * packed.weight_zero_point
    with torch.device("cpu"):
        return finish(total, packed.multiplier, call.output)
