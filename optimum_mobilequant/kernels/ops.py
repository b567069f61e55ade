"""The kernels as torch operators: ``torch.ops.mobilequant.linear_w8a8`` and its kin, and ``quantize``.

Operators, because ``torch.compile`` and ``torch.export`` can keep an operator whose result they know the shape of, and
cannot look into a compiled kernel. They have no gradients: integers have none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..numerics import Grid
from . import cpp
from .registry import BACKENDS
from .spec import FLOATS, Call, Output, Packed

NAMESPACE = "mobilequant"
WIDTHS = tuple((weight, activation) for weight in (8, 4) for activation in (8, 16))

_LINEAR = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, Tensor? weight_zero_point, int input_zero_point, "
    "int in_features, str backend, ScalarType dtype, int qmax, int zero_point, float scale) -> Tensor"
)
_QUANTIZE = "(Tensor x, float scale, int zero_point, int bits, str backend) -> Tensor"


def _check(x: Tensor, bias: Tensor, dtype: torch.dtype, in_features: int) -> None:
    if x.device != bias.device:
        raise ValueError(f"the layer was packed on {bias.device}, and its input lies on {x.device}")
    if x.dtype != dtype or x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"the layer takes codes of dtype {dtype} and shape [..., {in_features}], not {x.dtype} {list(x.shape)}"
        )


def _linear(weight_bits: int, activation_bits: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Implementation and shape function of one operator."""
    codes = Grid(activation_bits, signed=False).dtype

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        multiplier: Tensor,
        weight_zero_point: Tensor | None,
        input_zero_point: int,
        in_features: int,
        backend: str,
        dtype: torch.dtype,
        qmax: int,
        zero_point: int,
        scale: float,
    ) -> Tensor:
        _check(x, bias, codes, in_features)
        packed = Packed(weight, bias, multiplier, weight_zero_point, input_zero_point)
        output = Output(dtype, qmax, zero_point, scale)
        return (
            BACKENDS[backend]
            .run(Call(x, packed, output, weight_bits, activation_bits))
            .view(*x.shape[:-1], bias.shape[0])
        )

    def shape(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        multiplier: Tensor,
        weight_zero_point: Tensor | None,
        input_zero_point: int,
        in_features: int,
        backend: str,
        dtype: torch.dtype,
        qmax: int,
        zero_point: int,
        scale: float,
    ) -> Tensor:
        _check(x, bias, codes, in_features)
        return x.new_empty((*x.shape[:-1], bias.shape[0]), dtype=dtype)

    return run, shape


def _quantize(x: Tensor, scale: float, zero_point: int, bits: int, backend: str) -> Tensor:
    if bits == 8 and backend == "cpp" and x.device.type == "cpu" and x.dtype in FLOATS:
        return cpp.library().quantize(x, scale, zero_point)
    grid = Grid(bits, signed=False)
    # As numerics.quantize, in place: this is a large part of a small layer's time.
    codes = torch.div(x.float(), torch.tensor(scale, device=x.device)).round_().add_(zero_point)
    return codes.clamp_(grid.qmin, grid.qmax).to(grid.dtype).contiguous()


def _quantize_shape(x: Tensor, scale: float, zero_point: int, bits: int, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=Grid(bits, signed=False).dtype)


_LAYER = (
    "(Tensor x, Tensor? mask, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) key_sums, Tensor(c!) values, "
    "int past, Tensor constants, Tensor qkv, Tensor proj, Tensor gate_up, Tensor down) -> Tensor"
)
_NORM = "(Tensor x, Tensor constants) -> Tensor"


def _layer(
    x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, key_sums: Tensor, values: Tensor,
    past: int, constants: Tensor, qkv: Tensor, proj: Tensor, gate_up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    batch, sequence, _ = x.shape
    total = past + sequence
    if total > key_sums.shape[2] or key_sums.shape[0] != batch:
        raise ValueError(f"the cache has room for {list(key_sums.shape)}, not for {batch} x {total} positions")
    if mask is not None and (
        mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2] != sequence or mask.shape[3] < total
    ):
        raise ValueError(f"the mask is {list(mask.shape)}, and {batch} x {sequence} of {total} positions are computed")
    return cpp.library().layer(x, mask, cos, sin, keys, key_sums, values, past, constants, (qkv, proj, gate_up, down))


def _layer_shape(
    x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, key_sums: Tensor, values: Tensor,
    past: int, constants: Tensor, qkv: Tensor, proj: Tensor, gate_up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _norm(x: Tensor, constants: Tensor) -> Tensor:
    return cpp.library().norm(x, constants)


def _norm_shape(x: Tensor, constants: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    entries = {f"linear_w{w}a{a}": (_LINEAR, *_linear(w, a)) for w, a in WIDTHS}
    entries["quantize"] = (_QUANTIZE, _quantize, _quantize_shape)
    entries["decoder_layer"] = (_LAYER, _layer, _layer_shape)
    entries["norm"] = (_NORM, _norm, _norm_shape)
    for name, (schema, run, shape) in entries.items():
        library.define(name + schema)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=library)
    return library


_LIBRARY = _register()  # the operators live as long as this object
