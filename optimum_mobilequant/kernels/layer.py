"""A packed linear layer: chosen backend, packed tensors, one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .gpu.layout import GROUPS
from .registry import BACKENDS, Choice, choose, why_not
from .spec import Groups, LinearSpec, Output, Packed, Weights


@dataclass(frozen=True)
class IntegerLinear:
    """What :func:`prepare` made of a layer. Call it with codes."""

    spec: LinearSpec
    choice: Choice
    packed: Packed

    def __call__(self, x: Tensor) -> Tensor:
        """The layer on codes.

        Args:
            x: ``[..., in]``, uint8, or int32 for 16-bit activations.

        Returns:
            ``[..., out]``, dtype of the output asked for.

        Raises:
            ValueError: other dtype or width.
        """
        out: Tensor = getattr(torch.ops.mobilequant, self.spec.op)(*self.arguments(x))
        return out

    def arguments(self, x: Tensor) -> tuple[object, ...]:
        """The arguments of the operator ``torch.ops.mobilequant.<spec.op>`` for an input."""
        packed, output = self.packed, self.spec.output
        tensors = (x, packed.weight, packed.bias, packed.multiplier, packed.weight_zero_point)
        numbers = (packed.input_zero_point, self.spec.in_features, self.choice.backend.name)
        return (*tensors, *numbers, output.dtype, output.qmax, output.zero_point, output.scale)


def prepare(
    codes: Tensor,
    scale: Tensor,
    *,
    weight_bits: int,
    input_scale: float,
    input_zero_point: int,
    output: Output,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation_bits: int = 8,
    multiplier: Tensor | None = None,
    group: int = 0,
    backend: str | None = None,
) -> IntegerLinear:
    """Choose a backend for a layer and pack its weights.

    Args:
        codes: int8 ``[out, in]``, on the signed grid of ``weight_bits`` (what ``QWeight.codes`` returns).
        scale: float32 ``[out]`` or ``[out, 1]``. zero_point: int32 of that shape, or None if all are 0.
        weight_bits: 4 or 8. activation_bits: 8 or 16, of the input.
        input_scale, input_zero_point: static encoding of the input.
        output: what a call returns.
        bias: int32 ``[out]`` at ``input_scale * scale``.
        multiplier: uint8 ``[out, ceil(in / group)]``, 1 to 16: a 4-bit code counts as ``code * multiplier`` of its
            group, an exact 8-bit code. A backend without groups computes with those. group: 32, 64 or 128 columns.
        backend: a name of :data:`~.registry.BACKENDS`; None for the fastest.

    Raises:
        ValueError: shapes, dtypes or codes that do not fit together, or no backend for them.
    """
    if (weight_bits, activation_bits) not in ops.WIDTHS:
        raise ValueError(f"weights have 4 or 8 bits and activations 8 or 16, not {weight_bits} and {activation_bits}")
    if codes.ndim != 2 or codes.dtype != torch.int8 or 0 in codes.shape:
        raise ValueError(f"codes are int8 [out, in], not {codes.dtype} {list(codes.shape)}")
    if weight_bits == 4 and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError("4-bit codes lie in [-8, 7]; are these 8-bit codes?")
    rows, columns = codes.shape
    for name, tensor in (("scale", scale), ("zero_point", zero_point), ("bias", bias)):
        if tensor is not None and tensor.numel() != rows:
            raise ValueError(f"{name} has {tensor.numel()} elements for {rows} output features")
    if zero_point is not None and not bool(zero_point.any()):
        zero_point = None
    groups = None
    if multiplier is not None:
        groups, codes, weight_bits = _grouped(codes, multiplier, group, weight_bits, zero_point)
    spec = LinearSpec(
        weight_bits, activation_bits, zero_point is None, columns, rows, codes.device.type, output,
    )  # fmt: skip
    if groups is not None:
        two_levels = replace(spec, weight_bits=4, group=group)
        wanted = [name for name, found in BACKENDS.items() if found.groups and backend in (None, name)]
        if any(why_not(name, two_levels) is None for name in wanted):
            spec = two_levels
    if not 0 <= input_zero_point <= spec.grid.qmax:
        raise ValueError(f"the input's zero point {input_zero_point} is not on its grid")
    weights = Weights(
        codes,
        scale.detach().reshape(-1),
        None if zero_point is None else zero_point.reshape(-1),
        None if bias is None else bias.reshape(-1),
        input_scale,
        input_zero_point,
        groups,
    )
    choice = choose(spec, backend=backend)
    with torch.device(codes.device):  # whatever default device a loader has set
        return IntegerLinear(spec, choice, choice.backend.pack(spec, weights))


def _grouped(
    codes: Tensor, multiplier: Tensor, group: int, weight_bits: int, zero_point: Tensor | None
) -> tuple[Groups, Tensor, int]:
    """Both levels of a grouped weight, and the 8-bit codes that they make."""
    if weight_bits != 4 or zero_point is not None or group not in GROUPS:
        raise ValueError(f"groups of 32, 64 or 128 columns are for symmetric 4-bit weights; group is {group}")
    shape = (codes.shape[0], -(-codes.shape[1] // group))
    if multiplier.dtype != torch.uint8 or tuple(multiplier.shape) != shape:
        raise ValueError(f"multiplier is uint8 {list(shape)}, not {multiplier.dtype} {list(multiplier.shape)}")
    if int(multiplier.min()) < 1 or int(multiplier.max()) > 16:
        raise ValueError("multipliers lie in 1 to 16: with others a product leaves 8 bits")
    factors = multiplier.repeat_interleave(group, 1)[:, : codes.shape[1]].to(torch.int16)
    return Groups(codes, multiplier), (codes * factors).to(torch.int8), 8
