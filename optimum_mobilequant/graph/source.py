"""Where the tensors of a graph come from: a checkpoint of this package, or another kind of quantized model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.pack import bias_scale, input_of
from ..nn import QuantActivation, QuantEmbedding, Quantizer, QuantNorm, QWeight
from ..nn.shift import SHIFT_GRID, shift_scale
from ..numerics import Grid, quantize
from ..plan import Plan
from .ir import Encoding

_BIAS_GRID = Grid(32, signed=True)


@dataclass(frozen=True)
class Constant:
    """A tensor that is known before the graph runs.

    Args:
        shape: of the tensor.
        encoding: of its integers; None for floats.
        read: returns the codes (``encoding.grid.dtype``), or float32 values where there is no encoding.
    """

    shape: tuple[int, ...]
    encoding: Encoding | None
    read: Callable[[], Tensor]

    def scaled(self, factor: float) -> Constant:
        """The tensor times ``factor``: in the scale of an encoded one, in the values of a float one."""
        if factor == 1.0:
            return self
        if self.encoding is not None:
            return Constant(self.shape, self.encoding.scaled(factor), self.read)
        return Constant(self.shape, None, lambda: self.read() * factor)


class TensorSource(Protocol):
    """What the builder asks for, by the names of the plan."""

    def activation(self, name: str) -> Encoding | None:
        """Encoding of an activation, None where it is a float."""

    def weight(self, path: str) -> Constant:
        """Matrix of a linear or an embedding, or the gain that a norm multiplies with."""

    def bias(self, path: str, owner: str) -> Constant | None:
        """Bias of a linear or a norm, or None; ``owner`` is the module whose weight it uses."""

    def key_shift(self, attention: str) -> Constant | None:
        """Constant added to rotated keys, or None."""

    def table(self) -> Constant:
        """What the embedding returns for each token, on the encoding of its output."""

    def norm(self, path: str) -> tuple[float, bool]:
        """Epsilon, and whether the mean is subtracted."""

    def function(self, path: str) -> nn.Module:
        """The activation function of an MLP."""


class CheckpointSource:
    """The tensors of a model that this package quantized."""

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan = model, plan

    def activation(self, name: str) -> Encoding:
        quantizer: Any = self.model.get_submodule(name)
        assert isinstance(quantizer, Quantizer)
        return Encoding(quantizer.scale.detach().cpu(), quantizer.zero_point.detach().cpu(), quantizer.spec.grid)

    def weight(self, path: str) -> Constant:
        held: QWeight = self.model.get_submodule(path).weight  # type: ignore[assignment]
        spec = self.plan.weights[path]
        scale, zero_point = held.scale.detach().flatten(), held.zero_point.flatten()
        if not spec.per_channel:
            scale, zero_point = scale[0], zero_point[0]
        encoding = Encoding(scale.float().cpu(), zero_point.to(torch.int32).cpu(), spec.code_grid)
        return Constant(tuple(held.shape), encoding, lambda: held.codes.cpu())

    def bias(self, path: str, owner: str) -> Constant | None:
        module: Any = self.model.get_submodule(path)
        if module.bias is None:
            return None
        held: QWeight = self.model.get_submodule(owner).weight  # type: ignore[assignment]
        near = f"{path}.output" if self.plan.weights[path].role == "gain" else input_of(self.plan, path)
        quantizer: Any = self.model.get_submodule(near)
        scale = bias_scale(self.plan, path, {near: (quantizer.scale, quantizer.zero_point)}, held.scale).detach()
        encoding = Encoding(scale.float().cpu(), torch.zeros_like(scale, dtype=torch.int32).cpu(), _BIAS_GRID)

        def codes() -> Tensor:
            return quantize(module.bias.detach().cpu(), encoding.scale, encoding.zero_point, _BIAS_GRID)

        return Constant(tuple(module.bias.shape), encoding, codes)

    def key_shift(self, attention: str) -> Constant | None:
        module = self.model.get_submodule(attention)
        shift: Any = getattr(module, "key_shift", None)
        if shift is None:
            return None
        scale = shift_scale(shift.rotated_from(module)).detach().cpu()
        encoding = Encoding(scale, torch.zeros_like(scale, dtype=torch.int32), SHIFT_GRID)
        heads, size = shift.codes.shape
        return Constant((heads, 1, size), encoding, lambda: shift.codes[:, None].cpu())

    def table(self) -> Constant:
        path = self.plan.family.embedding
        module: Any = self.model.get_submodule(path)
        assert isinstance(module, QuantEmbedding)
        encoding = self.activation(f"{path}.output")

        def codes() -> Tensor:
            table: QWeight = module.weight  # type: ignore[assignment]
            out = torch.empty(tuple(table.shape), dtype=encoding.grid.dtype)
            for ids in torch.arange(module.num_embeddings).split(8192):  # a whole table in float32 is 4 times its size
                rows = table.rows(ids.to(table.device))
                values = rows if module.multiplier == 1.0 else rows * module.multiplier
                out[ids] = quantize(values.cpu(), encoding.scale, encoding.zero_point, encoding.grid)
            return out

        return Constant(tuple(module.weight.shape), encoding, codes)

    def norm(self, path: str) -> tuple[float, bool]:
        module: Any = self.model.get_submodule(path)
        assert isinstance(module, QuantNorm)
        return module.eps, module.centre

    def function(self, path: str) -> nn.Module:
        module: Any = self.model.get_submodule(path)
        assert isinstance(module, QuantActivation)
        return module.function
