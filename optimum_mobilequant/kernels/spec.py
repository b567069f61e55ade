"""What an integer linear layer is to the backends: its kind, its output, and the tensors one backend made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Grid

FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Output:
    """What becomes of ``total = sum_k (x - x_zero) * (w - w_zero) + bias``. Made by the class methods.

    Args:
        dtype: of the result.
        qmax: largest code, or 0 where nothing is rounded to a grid. zero_point, scale: of that grid.
    """

    dtype: torch.dtype
    qmax: int = 0
    zero_point: int = 0
    scale: float = 1.0

    @classmethod
    def totals(cls) -> Output:
        """The int32 totals themselves."""
        return cls(torch.int32)

    @classmethod
    def real(cls, dtype: torch.dtype) -> Output:
        """``total * input_scale * weight_scale``: float32 or bfloat16, not rounded to a grid."""
        return cls(_float(dtype))

    @classmethod
    def codes(cls, scale: float, zero_point: int, grid: Grid) -> Output:
        """Codes of an unsigned activation grid, in its dtype: rounded once, ties to even."""
        return cls(grid.dtype, _unsigned(grid).qmax, zero_point, scale)

    @classmethod
    def on_grid(cls, scale: float, zero_point: int, grid: Grid, dtype: torch.dtype) -> Output:
        """The values ``(code - zero_point) * scale`` of those codes: float32 or bfloat16."""
        return cls(_float(dtype), _unsigned(grid).qmax, zero_point, scale)

    @property
    def is_totals(self) -> bool:
        return self.dtype == torch.int32 and not self.qmax


def _float(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATS:
        raise ValueError(f"the kernels write float32 or bfloat16, not {dtype}")
    return dtype


def _unsigned(grid: Grid) -> Grid:
    if grid.signed or grid.bits > 16:
        raise ValueError(f"an activation grid is unsigned and has up to 16 bits, not {grid}")
    return grid


@dataclass(frozen=True)
class LinearSpec:
    """The properties of a layer that decide which backend can run it.

    Args:
        weight_bits: 4 or 8. activation_bits: of the input, 8 or 16.
        symmetric: whether all zero points of the weight are 0.
        in_features, out_features: the weight is ``[out_features, in_features]``.
        device: type of the device, e.g. ``"cpu"``.
        output: what is asked for.
        group: columns of the weight that share a multiplier (:class:`Groups`), or 0: none.
    """

    weight_bits: int
    activation_bits: int
    symmetric: bool
    in_features: int
    out_features: int
    device: str
    output: Output
    group: int = 0

    @property
    def grid(self) -> Grid:
        """Grid of the input's codes."""
        return Grid(self.activation_bits, signed=False)

    @property
    def op(self) -> str:
        """Name of the operator in the ``mobilequant`` namespace."""
        return f"linear_w{self.weight_bits}a{self.activation_bits}"


@dataclass(frozen=True)
class Groups:
    """The two integer levels of a 4-bit weight with groups: ``code = nibble * multiplier``, exactly.

    Args:
        nibbles: int8 ``[out, in]`` in [-8, 7]. multiplier: uint8 ``[out, groups]``, from 1 to 16.
    """

    nibbles: Tensor
    multiplier: Tensor


@dataclass(frozen=True)
class Weights:
    """A layer's integers, in no machine's layout: what a checkpoint holds.

    Args:
        codes: int8 ``[out, in]``. scale: float32 ``[out]``. zero_point: int32 ``[out]``, or None if all are 0.
        bias: int32 ``[out]`` at ``input_scale * scale``, or None.
        input_scale, input_zero_point: encoding of the input.
        groups: what ``codes`` are products of, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: float
    input_zero_point: int
    groups: Groups | None = None

    def real_factor(self, output: Output) -> Tensor:
        """float64 ``[out]``: what a total is multiplied with, to the output's steps or, without a grid, to reals."""
        factor = self.scale.double() * self.input_scale
        return factor / output.scale if output.qmax else factor

    def largest_total(self, spec: LinearSpec) -> int:
        """A bound on the magnitude of a total over all inputs; exact only where it comes near 2**31."""
        rough = self.codes.shape[1] * 256 * 2**spec.activation_bits
        if self.bias is not None:
            rough += int(self.bias.to(torch.int64).abs().max())
        if rough < 2**31:
            return rough
        wide = self.codes.to(torch.int64)
        if self.zero_point is not None:
            wide -= self.zero_point.to(torch.int64)[:, None]
        reach = max(self.input_zero_point, spec.grid.qmax - self.input_zero_point)
        bound = wide.abs().sum(1) * reach
        return int((bound if self.bias is None else bound + self.bias.to(torch.int64).abs()).max())

    def folded_bias(self) -> Tensor:
        """int64 ``[out]``: ``total = sum_k x * w - w_zero * sum_k x + folded_bias``, the input's zero point being
        constant (Jacob et al., CVPR 2018, section 2.3)."""
        folded = -self.input_zero_point * self.codes.sum(1, dtype=torch.int64)
        if self.zero_point is not None:
            folded += self.input_zero_point * self.codes.shape[1] * self.zero_point.to(torch.int64)
        return folded if self.bias is None else folded + self.bias.to(torch.int64)


@dataclass(frozen=True)
class Packed:
    """The tensors a backend computes with, as its ``pack`` made them; the operators take them apart.

    Args:
        weight: in the backend's layout. bias: ``[out]``, integer or float as the backend wants it.
        multiplier: float32 ``[out]``; or int32 ``[2, out]``, mantissas and shifts of
            :class:`~..numerics.integer.Multiplier`.
        weight_zero_point: int32 ``[out]`` or None. input_zero_point: 0 where it is folded into the bias.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    weight_zero_point: Tensor | None
    input_zero_point: int


@dataclass(frozen=True)
class Call:
    """One call of an operator, as a backend's ``run`` gets it: ``x`` is ``[..., in]``, uint8 or (16 bits) int32."""

    x: Tensor
    packed: Packed
    output: Output
    weight_bits: int
    activation_bits: int

    @property
    def out_features(self) -> int:
        return self.packed.bias.shape[0]
