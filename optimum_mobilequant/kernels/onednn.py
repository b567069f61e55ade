"""oneDNN backend: torch's own quantized linear on x86, for machines without a compiler and for AMX.

Activations are always passed as uint8. With int8 activations oneDNN runs a reference loop for small products: a key or
value projection at decode then takes milliseconds, not microseconds; with uint8 it never does. 4-bit weights are
unpacked to int8 when they are packed: int8 speed, no memory saved.

What a product cannot take at once is taken in planes: a code is a sum of fields of its bits, each of which is a row of
the same product, so weights are read once. So it is with 16-bit codes, and with 8-bit weights where two products of
8 bits by 8 would saturate (processors without VNNI instructions).
"""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .reference import pack_multiplier
from .simulate import finish_float
from .spec import Call, LinearSpec, Output, Packed, Weights

# The number of rows that the layout of the weights is chosen for: this hint serves 1 to 256 rows best.
_ROWS = 256
_X86 = ("x86_64", "amd64")


@cache
def available() -> str | None:
    """Why this backend cannot be used here, or None."""
    if platform.machine().lower() not in _X86:
        return "torch's quantized linear is for x86 processors"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "the processor has no AVX2"
    try:
        right = _is_exact(-15)
    except (AttributeError, RuntimeError) as error:
        return f"torch's quantized linear does not run: {str(error).splitlines()[0]}"
    return None if right else "torch's quantized linear computes wrong results on this processor"


@cache
def saturates() -> bool:
    """Whether products of 8 bits by 8 are wrong here: without VNNI instructions pairs of products are added in 16
    bits. Those of 4-bit weights fit, and those of 7-bit activations. Only where the backend is available."""
    return not _is_exact(-128)


def shifts(weight_bits: int, activation_bits: int) -> tuple[int, ...]:
    """Where the fields of a code begin, the highest first; one field starts at 0 where a code is taken at once."""
    if weight_bits == 8 and saturates():
        return (9, 2, 0) if activation_bits == 16 else (1, 0)  # of up to 7 bits
    return (8, 0) if activation_bits == 16 else (0,)


def _is_exact(code: int) -> bool:
    """Whether the largest activations times one weight are summed exactly."""
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 32), code, dtype=torch.int8, device="cpu"), [_ROWS, 32])
    x, one = torch.full((2, 32), 255, dtype=torch.uint8, device="cpu"), torch.ones(16, device="cpu")
    found = _qlinear(x, 0, weight, one, torch.zeros_like(one), torch.float32, 0)
    return bool((found == code * 255 * 32).all())


def supports(spec: LinearSpec) -> str | None:
    """Why this backend cannot run a layer, or None."""
    if spec.device != "cpu":
        return "it computes on the CPU"
    if spec.weight_bits == 8 and not spec.symmetric:
        return "it takes symmetric 8-bit weights only"
    if spec.output.is_totals:
        return "it does not return int32 totals"
    return None


def pack(spec: LinearSpec, weights: Weights) -> Packed:
    """Weights in oneDNN's layout; the zero point of a 4-bit weight is subtracted (the result fits 8 bits)."""
    codes = weights.codes
    if weights.zero_point is not None:
        codes = (codes.to(torch.int32) - weights.zero_point[:, None]).to(torch.int8)
    factor = weights.real_factor(spec.output)
    bias = torch.zeros_like(factor) if weights.bias is None else weights.bias.double()
    bits = (spec.weight_bits, spec.activation_bits)
    packed = pack_factors(codes, factor, factor * bias, weights.input_zero_point, bits)
    return replace(packed, weight_zero_point=weights.zero_point)


def pack_factors(codes: Tensor, factor: Tensor, bias: Tensor, input_zero_point: int, bits: tuple[int, int]) -> Packed:
    """A layer that gives ``factor * sum_k (x - x_zero) * w + bias``.

    Args:
        codes: int8 ``[out, in]``. factor, bias: float64 ``[out]``.
        bits: of the weight (as the operator has it) and of ``x``.
    """
    weights = sum(1 << shift for shift in shifts(*bits))  # of the fields, in a code
    zero_point = min(round(input_zero_point / weights), 255)  # every field's; what is left goes into the bias
    bias = bias - factor * (input_zero_point - weights * zero_point) * codes.sum(1, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), [_ROWS, codes.shape[1]])
    return Packed(packed, bias.float(), pack_multiplier(factor, Output.real(torch.float32)), None, zero_point)


def unpack(spec: LinearSpec, packed: Packed) -> Tensor:
    """The codes that :func:`pack` was given."""
    codes = packed.weight.to_dense().t()
    if packed.weight_zero_point is not None:
        codes = codes + packed.weight_zero_point[:, None]
    return codes.to(torch.int8).contiguous()


def run(call: Call) -> Tensor:
    """8-bit codes and plain floats come from oneDNN's own epilogue, the others from float32 steps."""
    packed, output = call.packed, call.output
    x = call.x.reshape(-1, call.x.shape[-1]).contiguous()
    shape = (*call.x.shape[:-1], call.out_features)
    if x.shape[0] == 0:
        return x.new_empty(shape, dtype=output.dtype)
    if len(begins := shifts(call.weight_bits, call.activation_bits)) > 1:
        return _in_planes(x, call, begins).view(shape)
    own = output.dtype if output.dtype == torch.uint8 and output.qmax == 255 or not output.qmax else torch.float32
    zero_point = output.zero_point if own == torch.uint8 else 0
    out = _qlinear(x, packed.input_zero_point, packed.weight, packed.multiplier, packed.bias, own, zero_point)
    return (finish_float(out, call) if own == torch.float32 and output.qmax else out).view(shape)


def _in_planes(x: Tensor, call: Call, begins: tuple[int, ...]) -> Tensor:
    """The fields of the codes as rows of one product, added in float32."""
    packed = call.packed
    ends = (call.activation_bits, *begins)
    planes = torch.cat([(x >> b) & ((1 << e - b) - 1) for e, b in zip(ends, begins, strict=False)]).to(torch.uint8)
    no_bias = torch.zeros_like(packed.bias)
    parts = _qlinear(planes, packed.input_zero_point, packed.weight, packed.multiplier, no_bias, torch.float32, 0)
    out = packed.bias.expand(x.shape[0], -1)
    for begin, part in zip(begins, parts.chunk(len(begins)), strict=True):
        out = torch.add(out, part, alpha=1 << begin)
    return finish_float(out, call)


def _qlinear(
    x: Tensor, x_zero: int, weight: Tensor, factor: Tensor, bias: Tensor, dtype: torch.dtype, zero: int
) -> Tensor:
    no_zeros = torch.zeros_like(factor, dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, x_zero, weight, factor, no_zeros, bias, 1.0, zero, dtype, "none", [], ""
    )
    return out
