"""Random integer layers, their exact result in plain integers, and the backends that can be tested here."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optimum_mobilequant.kernels import BACKENDS, IntegerLinear, Output, cpp, prepare
from optimum_mobilequant.kernels.cpp.library import Library
from optimum_mobilequant.numerics import Grid

U8, U16 = Grid(8, False), Grid(16, False)
# Codes on an 8-bit grid, on a 16-bit grid, reals and grid values: every kind of output but the totals.
OUTPUTS = {
    "codes": Output.codes(0.11, 117, U8),
    "codes16": Output.codes(0.0004, 30000, U16),
    "float32": Output.real(torch.float32),
    "bfloat16": Output.real(torch.bfloat16),
    "grid float32": Output.on_grid(0.11, 117, U8, torch.float32),
    "grid bfloat16": Output.on_grid(0.11, 117, U8, torch.bfloat16),
}


@dataclass
class Layer:
    """A weight with its encodings, and an input."""

    bits: int
    codes: Tensor
    zero_point: Tensor | None
    bias: Tensor
    scale: Tensor
    x: Tensor
    x_zero: int
    activation_bits: int = 8
    x_scale: float = 0.02

    def prepare(self, output: Output, backend: str | None = None) -> IntegerLinear:
        return prepare(
            self.codes, self.scale, zero_point=self.zero_point, bias=self.bias, weight_bits=self.bits,
            activation_bits=self.activation_bits, input_scale=self.x_scale, input_zero_point=self.x_zero,
            output=output, backend=backend,
        )  # fmt: skip

    def totals(self) -> Tensor:
        """int64, by torch's plain integer product."""
        weight = self.codes.long()
        if self.zero_point is not None:
            weight = weight - self.zero_point.long()[:, None]
        return torch.matmul(self.x.long() - self.x_zero, weight.t()) + self.bias.long()


def make(m: int, n: int, k: int, *, bits: int = 8, symmetric: bool = True, activation_bits: int = 8) -> Layer:
    """A layer whose codes include the extremes of their grids."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    top = 2**activation_bits - 1
    codes = torch.randint(low, high, (n, k), dtype=torch.int8)
    x = torch.randint(0, top + 1, (m, k), dtype=torch.uint8 if activation_bits == 8 else torch.int32)
    if n * k:
        codes.view(-1)[:: max(1, n * k // 7)] = low
    if m * k:
        x.view(-1)[:: max(1, m * k // 5)] = top
    zero = None if symmetric else torch.randint(low, high, (n,), dtype=torch.int32)
    bias = torch.randint(-30000, 30000, (n,), dtype=torch.int32)
    # Outputs of some hundred steps, so that codes are neither all equal nor all clipped.
    scale = (torch.rand(n) + 0.5) * 1200 / (k**0.5 * top * high)
    return Layer(bits, codes, zero, bias, scale, x, 128 if activation_bits == 8 else 31000, activation_bits)


@cache
def library(isa: str | None = None) -> Library:
    return Library(cpp.build_library(), isa)


def variants() -> list[str]:
    """The CPU backends that run here; the compiled one once for each instruction set of this processor."""
    found = [name for name in BACKENDS if name not in ("cpp", "triton") and BACKENDS[name].available() is None]
    return found + ([] if cpp.available() else [f"cpp:{isa}" for isa in library().instruction_sets])


def use(variant: str, monkeypatch) -> str:
    """Name of the backend of a variant, its instruction set being made the one in use."""
    name, _, isa = variant.partition(":")
    if isa:
        monkeypatch.setattr(cpp, "library", lambda: library(isa))
    return name
