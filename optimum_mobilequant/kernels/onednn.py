"""oneDNN backend: torch's own quantized linear on x86, for machines without a compiler and for AMX.

Activations are always passed as uint8. With int8 activations oneDNN runs a reference loop for small products: a key or
value projection at decode then takes milliseconds, not microseconds; with uint8 it never does. 4-bit weights are
unpacked to int8 when they are packed: int8 speed, no memory saved.
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
    """Whether products of 8-bit weights are wrong here: without VNNI instructions pairs of products are added in 16
    bits. Those of 4-bit weights fit. Only where the backend is available."""
    return not _is_exact(-128)


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
    if spec.weight_bits == 8 and available() is None and saturates():
        return "on a processor without VNNI instructions it saturates with 8-bit weights"
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
    zero_point = weights.input_zero_point
    if spec.activation_bits == 16:  # both bytes get the same zero point; what is left goes into the bias
        zero_point = min(round(zero_point / 257), 255)
        bias = bias - (weights.input_zero_point - 257 * zero_point) * codes.sum(1, dtype=torch.int64)
    packed = pack_factors(codes, factor, factor * bias, zero_point)
    return replace(packed, weight_zero_point=weights.zero_point)


def pack_factors(codes: Tensor, factor: Tensor, bias: Tensor, input_zero_point: int) -> Packed:
    """A layer that gives ``factor * sum_k (x - x_zero) * w + bias``.

    Args:
        codes: int8 ``[out, in]``. factor, bias: float64 ``[out]``.
    """
    packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), [_ROWS, codes.shape[1]])
    return Packed(packed, bias.float(), pack_multiplier(factor, Output.real(torch.float32)), None, input_zero_point)


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
    if call.activation_bits == 16:
        return _wide(x, call).view(shape)
    own = output.dtype if output.dtype == torch.uint8 and output.qmax == 255 or not output.qmax else torch.float32
    zero_point = output.zero_point if own == torch.uint8 else 0
    out = _qlinear(x, packed.input_zero_point, packed.weight, packed.multiplier, packed.bias, own, zero_point)
    return (finish_float(out, call) if own == torch.float32 and output.qmax else out).view(shape)


def _wide(x: Tensor, call: Call) -> Tensor:
    """16-bit codes as ``256 * high + low``: two rows of bytes in one product, added in float32."""
    packed, output = call.packed, call.output
    planes = torch.cat([x >> 8, x & 0xFF]).to(torch.uint8)
    no_bias = torch.zeros_like(packed.bias)
    parts = _qlinear(planes, packed.input_zero_point, packed.weight, packed.multiplier, no_bias, torch.float32, 0)
    high, low = parts.chunk(2)
    out = torch.add(low, high, alpha=256).add_(packed.bias)
    return finish_float(out, call) if output.qmax else out.to(output.dtype)


def _qlinear(
    x: Tensor, x_zero: int, weight: Tensor, factor: Tensor, bias: Tensor, dtype: torch.dtype, zero: int
) -> Tensor:
    no_zeros = torch.zeros_like(factor, dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, x_zero, weight, factor, no_zeros, bias, 1.0, zero, dtype, "none", [], ""
    )
    return out
