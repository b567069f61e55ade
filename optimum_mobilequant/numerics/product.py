"""Matrix products in float32 for the many passes of calibration and tuning."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def _onednn_is_faster() -> bool:
    """torch multiplies float32 matrices with MKL, which runs older code on processors of other makers: half the
    speed of oneDNN on an AMD processor with AVX-512, measured (benchmarks/tuning_speed.py)."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with gradients, up to the order of sums what ``F.linear`` computes.

    Args:
        x: ``[..., in]``. weight: ``[out, in]``. bias: ``[out]`` or None.
    """
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.ndim == 2
    if not (plain and torch.backends.mkldnn.enabled and _onednn_is_faster()):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        out: Tensor = _Product.apply(x, weight, bias)
        return out
    return _multiply(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return out


def _dense(x: Tensor) -> Tensor:
    """oneDNN takes a matrix or its transpose; for other strides it has a loop that is a thousand times slower."""
    return x if x.is_contiguous() or (x.ndim == 2 and x.t().is_contiguous()) else x.contiguous()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = _multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None
        flat = grad.flatten(0, -2)
        grad_weight = _multiply(flat.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
