"""A linear layer that owns its packed weight: floats on the input's grid in, floats on the output's grid out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import BACKENDS, Choice, IntegerLinear, LinearSpec, Output, choose, prepare
from ..kernels.cpp.memory import copy_packed
from ..kernels.registry import order, why_not
from ..kernels.spec import FLOATS, Packed
from ..nn import QuantEmbedding, Quantizer, QuantLinear, QWeight
from ..nn.formats import FormatWeight
from ..numerics import Grid, quantize

_TENSORS = ("weight", "bias", "multiplier", "weight_zero_point")


# Bits of stored weights -> bits that kernels keep them in.
KERNEL_BITS = {3: 4, 4: 4, 8: 8}


class PackedLinear(nn.Module):
    """What computes a :class:`~..nn.QuantLinear` on integers; its tensors are buffers that no state dict holds.

    The weight's codes live here, in the kernel's layout, and :class:`~..nn.QWeight` reads them back where somebody
    asks for them. Moving the model to another device gives them back (:func:`~.backend.refresh` packs again).

    Args:
        linear: the prepared kernel. input: quantizer of what the layer reads.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    weight_zero_point: Tensor | None
    like: QuantEmbedding | None

    def __init__(self, linear: IntegerLinear, input: Quantizer):
        super().__init__()
        self.spec, self.choice = linear.spec, linear.choice
        self.input_zero_point = linear.packed.input_zero_point
        self.scale, self.zero_point = float(input.scale), int(input.zero_point)
        # Of the head: the embedding, which knows the dtype that the model computes in. Not a part of this module.
        object.__setattr__(self, "like", None)
        for name in _TENSORS:
            self.register_buffer(name, getattr(linear.packed, name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` floats on the input's grid -> ``[..., out]`` in the dtype of ``x``, on the output's grid."""
        if x.device.type != self.spec.device:
            raise RuntimeError(
                f"the layer was packed for {self.spec.device} and gets an input on {x.device}: call "
                "optimum_mobilequant.set_backend(model, ...) after moving a part of a model"
            )
        backend, output = self.choice.backend.name, self.spec.output
        dtype = x.dtype if x.dtype in FLOATS else torch.float32
        codes = torch.ops.mobilequant.quantize(
            x.to(dtype), self.scale, self.zero_point, self.spec.activation_bits, backend
        )
        out: Tensor = getattr(torch.ops.mobilequant, self.spec.op)(
            codes, self.weight, self.bias, self.multiplier, self.weight_zero_point, self.input_zero_point,
            self.spec.in_features, backend, dtype, output.qmax, output.zero_point, output.scale,
        )  # fmt: skip
        return out.to(x.dtype if self.like is None else self.like.dtype_anchor.dtype)

    @property
    def packed(self) -> Packed:
        return Packed(self.weight, self.bias, self.multiplier, self.weight_zero_point, self.input_zero_point)

    def codes(self) -> Tensor:
        """The weight's codes, int8 ``[out, in]``."""
        unpack = self.choice.backend.unpack
        assert unpack is not None
        return unpack(self.spec, self.packed)

    def rows(self, ids: Tensor) -> Tensor:
        """Codes of some output channels, int8 ``[*ids.shape, in]``."""
        unpack_rows = self.choice.backend.unpack_rows
        return self.codes()[ids] if unpack_rows is None else unpack_rows(self.spec, self.packed, ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        return self  # no cast changes integers; a move to another device gives them back to QWeight

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if self.weight.is_mkldnn:  # torch copies these with clone() only
            memo[id(self.weight)] = self.weight.clone()
        elif self.choice.backend.name == "cpp":
            memo[id(self.weight)] = copy_packed(self.weight)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def extra_repr(self) -> str:
        return f"{self.spec.op}, {self.choice.backend.name}"


@dataclass(frozen=True)
class Served:
    """How one layer is computed.

    Args:
        name: path of the layer. operator: e.g. ``linear_w4a8``. backend: what computes it.
        reasons: for each faster backend, why it does not.
    """

    name: str
    operator: str
    backend: str
    reasons: Mapping[str, str]


def pack_linear(
    path: str, linear: QuantLinear, input: Quantizer, backend: str, *, like: QuantEmbedding | None = None
) -> tuple[PackedLinear | None, Served]:
    """Pack a layer for the kernel asked for, or else the fastest; the kernel takes the codes over.

    Args:
        path: of the layer. input: quantizer of what it reads.
        backend: a name of :data:`~..options.BACKENDS`, not ``"simulate"``.
        like: of the head, the embedding: the result gets the dtype the model computes in.

    Returns:
        The kernel, None where only the simulation can compute this layer; and what was chosen.
    """
    provider, output = linear._weight(), linear.output
    if isinstance(provider, FormatWeight):
        operator, reason = f"linear_{provider.rule.format}", "the storage format has no integers for a kernel"
        return None, Served(path, operator, "simulate", {"all": reason})
    assert isinstance(provider, QWeight)
    grid = Output.on_grid(float(output.scale), int(output.zero_point), output.spec.grid, torch.float32)
    if provider.code_bits not in KERNEL_BITS:
        operator, reason = f"linear_w{provider.rule.bits}a{input.spec.bits}", "kernels take weights of up to 8 bits"
        return None, Served(path, operator, "simulate", {"all": reason})
    rows, columns = provider.shape
    spec = LinearSpec(
        KERNEL_BITS[provider.code_bits], input.spec.bits, provider.rule.symmetric, columns, rows,
        provider.device.type, grid,
    )  # fmt: skip
    choice = choose_for(spec, backend)
    served = Served(path, spec.op, choice.backend.name, choice.reasons)
    if choice.backend.name == "simulate":
        return None, served
    scale = provider.scale.detach()
    bias = linear.bias
    if isinstance(bias, nn.Parameter):
        steps = input.scale * scale.reshape(-1)
        zero = torch.zeros_like(steps, dtype=torch.int32)
        bias = quantize(bias.detach().to(scale.device), steps, zero, Grid(32, signed=True))  # type: ignore[assignment]
    grouped = bool(provider.rule.group) and provider.device.type != "cpu"  # CPU kernels take their 8-bit products
    packed = prepare(
        (provider.nibbles if grouped else provider.codes).to(scale.device),
        scale,
        weight_bits=provider.rule.bits if grouped else spec.weight_bits,
        input_scale=float(input.scale),
        input_zero_point=int(input.zero_point),
        output=grid,
        zero_point=provider.zero_point,
        bias=bias,  # type: ignore[arg-type]
        activation_bits=spec.activation_bits,
        multiplier=provider.multiplier if grouped else None,
        group=(provider.rule.group or 0) if grouped else 0,
        backend=choice.backend.name,
    )
    kernel = PackedLinear(packed, input)
    object.__setattr__(kernel, "like", like)
    if choice.backend.unpack is not None and (linear.tied is None or choice.backend.unpack_rows is not None):
        provider.hand_over(kernel)  # else an embedding would unpack its whole table to read a row of it
    return kernel, served


def choose_for(spec: LinearSpec, backend: str) -> Choice:
    """The kernel of the name asked for; the fastest of the others, with the reason, where that one cannot."""
    if backend == "auto":
        return choose(spec)
    reason = why_not(backend, spec) if backend in BACKENDS else "this version has no such kernels"
    if reason is None:
        return Choice(BACKENDS[backend])
    others = {name: why_not(name, spec) for name in order(spec) if name != backend}
    name = next(name for name, other in others.items() if other is None)
    return Choice(BACKENDS[name], {backend: reason})
