"""Quantizer: the static encoding of one activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..numerics import fake_quantize, fake_quantize_learned, fake_quantize_open
from ..plan import ActivationSpec


class Mode(Enum):
    """What every quantizer of a model does: nothing, record, round by its buffers, or round by learned tensors."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"
    LEARN = "learn"


class Observer(Protocol):
    def update(self, x: Tensor) -> None: ...


class Quantizer(nn.Module):
    """Rounds one activation to its static per-tensor grid.

    Buffers: ``scale`` float32 0-dim and ``zero_point`` int32 0-dim; NaN and 0 until they are set. Both keep their
    dtype when the model is cast, so that a checkpoint's integers never depend on the compute dtype.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: ActivationSpec, device: torch.device | str | None = None):
        super().__init__()
        self.spec = spec
        scale, zero_point = spec.fixed or (float("nan"), 0)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32, device=device))
        self.mode = Mode.QUANTIZE
        self.observer: Observer | None = None
        self.learned: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is Mode.QUANTIZE:
            return fake_quantize(x, self.scale, self.zero_point, self.spec.grid)
        if self.mode is Mode.LEARN:
            if self.learned is not None:
                return fake_quantize_learned(x, *self.learned, self.spec.grid)
            # Known and score ranges hold all values; the score matrices are what would cost most to keep.
            is_open = self.spec.fixed is not None or self.spec.role == "scores"
            rounding = fake_quantize_open if is_open else fake_quantize
            return rounding(x, self.scale, self.zero_point, self.spec.grid)
        if self.mode is Mode.OBSERVE and self.observer is not None:
            self.observer.update(x.detach())
        return x

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store an encoding (0-dim tensors)."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        kept = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = kept.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.spec.role}, {self.spec.bits} bits"


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer of a swapped model, in module order."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            yield module


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Put every quantizer, and every weight that knows modes, into ``mode``."""
    for module in model.modules():
        if isinstance(getattr(module, "mode", None), Mode):
            module.mode = mode  # type: ignore[assignment]


def quantize_output(module: Any, args: Any, output: Any) -> Any:
    """Forward hook: round what a decoder layer or the rotary module returns by the quantizer it carries."""
    if hasattr(module, "fused"):  # a kernel computes the layer, rounding included
        return output
    if isinstance(output, tuple):
        return tuple(module.output(item) if isinstance(item, Tensor) else item for item in output)
    return module.output(output)
