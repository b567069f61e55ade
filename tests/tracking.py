"""Where every float tensor of a forward pass comes from, watched at the level of torch's dispatcher.

A tensor is *constant* (weights, tables, masks), *rounded* (the output of a quantizer, or moved data of it) or *raw*
(just computed). An integer runtime can execute a graph only if raw tensors go nowhere but into a quantizer; the
exceptions are the insides of operations that a runtime executes as one, listed in ``Tracker._fused``.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from optimum_mobilequant.nn import Quantizer, QuantNorm, QWeight

MOVES = {
    "view", "_unsafe_view", "transpose", "t", "expand", "slice", "cat", "clone", "copy_", "unsqueeze", "squeeze",
    "permute", "select", "split", "split_with_sizes", "index_select", "_to_copy", "detach", "alias", "reshape",
    "masked_fill", "neg", "lift_fresh", "repeat", "repeat_interleave", "narrow", "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Tag:
    kind: str  # constant, rounded or raw
    quantizer: Quantizer | None = None
    negated: bool = False
    scope: nn.Module | None = None  # raw: the norm inside which it was computed
    rotary: bool = False  # raw: a product with the rotary table


CONSTANT, RAW = Tag("constant"), Tag("raw")
_ORDER = {"constant": 0, "rounded": 1, "raw": 2}


class Tracker(TorchDispatchMode):
    """Collects ``violations`` while a quantized model runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tags = WeakTensorKeyDictionary()
        for tensor in [*model.parameters(), *model.buffers()]:
            self.tags[tensor] = CONSTANT
        self.violations: list[str] = []
        self.used: set[str] = set()
        self.skip = 0
        self.scope: nn.Module | None = None
        self.compute_ops = 0

    def tag_of(self, tensor: Tensor) -> Tag:
        if tensor in self.tags:
            return self.tags[tensor]
        # A cache starts from an empty tensor.
        return CONSTANT if tensor.ndim == 0 or tensor.numel() == 0 else RAW

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.skip:
            return out
        name = func.overloadpacket.__name__
        floats = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        tags = [self.tag_of(t) for t in floats]
        worst = max(tags, key=lambda t: _ORDER[t.kind], default=CONSTANT)
        if name == "copy_":
            tag = tags[1]
        elif name in MOVES:
            tag = replace(worst, negated=True) if name == "neg" else worst
        elif worst.kind == "constant":
            tag = CONSTANT
        else:
            self.compute_ops += 1
            tag = self._computed(name, floats, tags)
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and result.is_floating_point():
                self.tags[result] = tag
        return out

    def _computed(self, name: str, floats: list[Tensor], tags: list[Tag]) -> Tag:
        for tensor, tag in zip(floats, tags, strict=True):
            if tag.kind == "raw" and not self._fused(name, floats, tags, tag):
                self.violations.append(f"{name} reads a raw tensor of shape {tuple(tensor.shape)}")
            if tag.kind == "rounded" and not on_grid(tensor, tag):
                self.violations.append(f"{name} reads values off the grid of {tag.quantizer.spec.name}")
        roles = [t.quantizer.spec.role for t in tags if t.quantizer]
        if name == "add" and roles == ["scores"] and CONSTANT in tags:
            return next(t for t in tags if t.quantizer)  # the mask: adds 0, or hides by saturating
        rotary = name == "mul" and "rope_table" in roles
        return replace(RAW, scope=self.scope, rotary=rotary)

    def _fused(self, name: str, floats: list[Tensor], tags: list[Tag], tag: Tag) -> bool:
        if self.scope is not None and tag.scope is self.scope:
            return True  # inside a norm
        if name == "mul" and len([t for t in floats if t.ndim]) == 1:
            return True  # a constant factor belongs to the requantization multiplier
        return name == "add" and all(t.rotary for t in tags)  # int32 accumulator of the rotation


def on_grid(x: Tensor, tag: Tag) -> bool:
    """Whether the values are codes of the tag's quantizer (hidden scores apart, which softmax turns into 0)."""
    quantizer = tag.quantizer
    grid, zero_point = quantizer.spec.grid, int(quantizer.zero_point)
    x = x[x > torch.finfo(torch.float32).min].double()
    codes = x / quantizer.scale.double() * (-1 if tag.negated else 1) + zero_point
    # float32 values of codes up to 65535 resolve a code to better than 0.02
    whole = bool(((codes - codes.round()).abs() < 0.02).all())
    return whole and (tag.negated or bool(((codes > grid.qmin - 0.1) & (codes < grid.qmax + 0.1)).all()))


@contextmanager
def tracking(model: nn.Module) -> Any:
    """Run a quantized model inside to have its tensors followed."""
    tracker = Tracker(model)
    rounding, norming = Quantizer.forward, QuantNorm.forward
    whole, rows = QWeight.forward, QWeight.rows

    def hidden(function: Any, *args: Any) -> Tensor:
        tracker.skip += 1
        try:
            return function(*args)
        finally:
            tracker.skip -= 1

    def quantizer_forward(self: Quantizer, x: Tensor) -> Tensor:
        out = hidden(rounding, self, x)
        tracker.used.add(self.spec.name)
        tracker.tags[out] = Tag("rounded", self)
        return out

    def norm_forward(self: QuantNorm, x: Tensor) -> Tensor:
        tracker.scope = self
        try:
            return norming(self, x)
        finally:
            tracker.scope = None

    def weight_forward(self: QWeight, *args: Any) -> Tensor:
        out = hidden(whole, self, *args)
        tracker.tags[out] = CONSTANT
        return out

    def weight_rows(self: QWeight, ids: Tensor) -> Tensor:
        out = hidden(rows, self, ids)  # one scale a row: not yet on any static grid
        tracker.tags[out] = RAW
        return out

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Quantizer, "forward", quantizer_forward))
        stack.enter_context(mock.patch.object(QuantNorm, "forward", norm_forward))
        stack.enter_context(mock.patch.object(QWeight, "forward", weight_forward))
        stack.enter_context(mock.patch.object(QWeight, "rows", weight_rows))
        stack.enter_context(torch.no_grad())
        stack.enter_context(tracker)
        yield tracker
