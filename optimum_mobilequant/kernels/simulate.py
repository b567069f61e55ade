"""Simulation backend: the float32 product of dequantized tensors, on every device.

What the quantized model computes without kernels. Sums are rounded in float32, so codes may differ by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import Call, LinearSpec, Packed, Weights


def available() -> str | None:
    """None: always there."""
    return None


def supports(spec: LinearSpec) -> str | None:
    """Why this backend cannot run a layer, or None."""
    return "it computes in float32 and has no int32 totals" if spec.output.is_totals else None


def pack(spec: LinearSpec, weights: Weights) -> Packed:
    """Weight and bias as float32, in steps of the output (or in reals), so that the product needs no factor."""
    wide = weights.codes.to(torch.int32)
    if weights.zero_point is not None:
        wide = wide - weights.zero_point[:, None]
    factor = weights.real_factor(spec.output)
    bias = torch.zeros_like(factor) if weights.bias is None else factor * weights.bias
    weight = (wide * factor[:, None]).float()
    return Packed(weight, bias.float(), factor.float(), None, weights.input_zero_point)


def run(call: Call) -> Tensor:
    """Float product, then rounding to the output's grid."""
    packed = call.packed
    x = call.x.to(torch.int32) - packed.input_zero_point
    return finish_float(F.linear(x.float(), packed.weight, packed.bias), call)


def finish_float(steps: Tensor, call: Call) -> Tensor:
    """An output from float32 steps of its grid (or from reals, where it has none); ``steps`` is overwritten."""
    output = call.output
    if not output.qmax:
        return steps.to(output.dtype)
    steps = steps.round_().clamp_(-output.zero_point, output.qmax - output.zero_point)
    if output.dtype.is_floating_point:
        return steps.mul_(output.scale).to(output.dtype)
    return steps.add_(output.zero_point).to(output.dtype)
