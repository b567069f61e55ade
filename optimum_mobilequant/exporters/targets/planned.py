"""Encodings of a plan before anything is quantized: bits and symmetry are known, scales are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...graph.ir import Encoding
from ...graph.source import Constant
from ...nn.shift import SHIFT_GRID
from ...numerics import Grid
from ...numerics.groups import groups_of
from ...plan import Plan


class PlannedTensors:
    """A :class:`~...graph.source.TensorSource` whose scales are all 1 and whose constants hold nothing.

    An asymmetric weight has the zero point 1, for rules that ask.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan):
        self.model, self.plan = model, plan

    def activation(self, name: str) -> Encoding:
        return _encoding(self.plan.activations[name].grid, None, 0)

    def weight(self, path: str) -> Constant:
        module: Any = self.model.get_submodule(path)
        spec, shape = self.plan.weights[path], tuple(module.weight.shape)
        zero_point = 0 if spec.rule.symmetric else 1
        if spec.rule.group:
            scale = torch.ones(shape[0], groups_of(shape[1], spec.rule.group))
            zeros = torch.zeros_like(scale, dtype=torch.int32)
            return _nothing(shape, Encoding(scale, zeros, spec.grid, block_size=spec.rule.group))
        return _nothing(shape, _encoding(spec.grid, shape[0] if spec.per_channel else None, zero_point))

    def bias(self, path: str, owner: str) -> Constant | None:
        module: Any = self.model.get_submodule(path)
        if getattr(module, "bias", None) is None:
            return None
        shape = tuple(module.bias.shape)
        return _nothing(shape, _encoding(Grid(32, signed=True), shape[0], 0))

    def key_shift(self, attention: str) -> Constant | None:
        if not self.plan.key_shift:
            return None
        g = self.plan.geometry
        return _nothing((g.kv_heads, 1, g.head_dim), _encoding(SHIFT_GRID, None, 0))

    def table(self) -> Constant:
        path = self.plan.family.embedding
        module: Any = self.model.get_submodule(path)
        return _nothing(tuple(module.weight.shape), self.activation(f"{path}.output"))

    def norm(self, path: str) -> tuple[float, bool]:
        return 0.0, self.plan.family.norm_kind == "layer"

    def function(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


def _encoding(grid: Grid, units: int | None, zero_point: int) -> Encoding:
    shape = () if units is None else (units,)
    return Encoding(torch.ones(shape), torch.full(shape, zero_point, dtype=torch.int32), grid)


def _nothing(shape: tuple[int, ...], encoding: Encoding) -> Constant:
    def read() -> torch.Tensor:
        raise RuntimeError("a planned tensor has no values yet")

    return Constant(shape, encoding, read)
