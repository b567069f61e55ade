"""Reference backend: the executor's own integer arithmetic. Slow, on every machine, and what the others must equal.

Every backend that counts in integers must reproduce the int32 totals bit for bit; rounded outputs may differ from
these by at most one code (the compiled kernels: by nothing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Grid
from ..numerics.integer import Multiplier, Operand, integer_matmul, requantize
from .spec import Call, LinearSpec, Output, Packed, Weights


def available() -> str | None:
    """None: always there."""
    return None


def supports(spec: LinearSpec) -> str | None:
    """Why this backend cannot run a layer, or None."""
    return None if spec.device == "cpu" else "it computes on the CPU"


def pack(spec: LinearSpec, weights: Weights) -> Packed:
    """The codes, transposed; the bias as int64."""
    # copy_, not contiguous(): torch's integer product reads a [1, out] matrix with strides (1, 1) wrongly.
    columns = torch.empty((spec.in_features, spec.out_features), dtype=torch.int8, device="cpu").copy_(
        weights.codes.t()
    )
    bias = torch.zeros(spec.out_features, dtype=torch.int32, device="cpu") if weights.bias is None else weights.bias
    return Packed(
        columns,
        bias.to(torch.int64),
        pack_multiplier(weights.real_factor(spec.output), spec.output),
        weights.zero_point,
        weights.input_zero_point,
    )


def unpack(spec: LinearSpec, packed: Packed) -> Tensor:
    """The codes that :func:`pack` was given."""
    return packed.weight.t().contiguous()


def run(call: Call) -> Tensor:
    """Exact totals, then :func:`finish`."""
    zero = 0 if call.packed.weight_zero_point is None else call.packed.weight_zero_point
    x = call.x.reshape(-1, call.x.shape[-1]).contiguous()
    with torch.device("cpu"):  # whatever default device is set
        total = integer_matmul(
            Operand.of(x, call.packed.input_zero_point, Grid(call.activation_bits, signed=False)),
            Operand.of(call.packed.weight, zero, Grid(call.weight_bits, signed=True)),
            bias=call.packed.bias,
        )
        return finish(total, call.packed.multiplier, call.output)


def pack_multiplier(factor: Tensor, output: Output) -> Tensor:
    """``factor`` (float64 ``[out]``) as the ``multiplier`` of :class:`~.spec.Packed` that an output needs."""
    if not output.qmax:
        return factor.float()
    fixed = Multiplier.of(factor)
    return torch.stack([fixed.mantissa, fixed.shift]).to(torch.int32)


def finish(total: Tensor, multiplier: Tensor, output: Output) -> Tensor:
    """An output from exact totals.

    Args:
        total: int32 or int64 ``[..., out]``.
        multiplier: as :func:`pack_multiplier` gave it.
    """
    if output.is_totals:
        return total.to(torch.int32)
    if not output.qmax:
        return (total.float() * multiplier).to(output.dtype)
    fixed = Multiplier(multiplier[0].to(torch.int64), multiplier[1].to(torch.int64))
    codes = (requantize(total, fixed) + output.zero_point).clamp(0, output.qmax)
    if not output.dtype.is_floating_point:
        return codes.to(output.dtype)
    return ((codes - output.zero_point).float() * output.scale).to(output.dtype)
