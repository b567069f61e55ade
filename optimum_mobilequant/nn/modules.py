"""The replaced modules. Each computes what the original computes, on rounded weights, and rounds its output.

``weight`` is a submodule, not a parameter: :class:`~.qweight.QWeight` in a quantized model, a
:class:`~.tunable.TunableWeight` in the student that is being tuned. Both return the float values to compute with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..numerics.fake import compiled_passes
from ..numerics.product import product
from .formats import FormatWeight
from .quantizer import Quantizer
from .qweight import QWeight
from .tunable import TunableBias, TunableWeight

# What gives a module its weight: as stored, or as it is being tuned.
Weight = QWeight | FormatWeight | TunableWeight


class _Biased(nn.Module):
    """Keeps a packed bias float32 through casts: its integers would not survive a round trip through bfloat16."""

    bias: nn.Parameter | TunableBias | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Biased:
        kept = self.bias.data if isinstance(self.bias, nn.Parameter) else None
        super()._apply(fn, recurse)
        if kept is not None and isinstance(self.bias, nn.Parameter) and self.bias.dtype != kept.dtype:
            self.bias.data = kept.to(self.bias.device)
        return self


class QuantLinear(_Biased):
    """``output(x @ W.T + b)``.

    Args:
        weight: provider of ``W`` ``[out, in]``; None for a head tied to ``embedding``.
        bias: float32 ``[out]``, on the int32 grid once packed; or None.
        output: quantizer of the result.
        input: quantizer of ``x``, for the one linear whose producer is no module (down: act(gate) * up).
        tied: the embedding whose table a tied head reads.
    """

    def __init__(
        self,
        weight: Weight | None,
        bias: nn.Parameter | TunableBias | None,
        output: Quantizer,
        *,
        input: Quantizer | None = None,
        tied: QuantEmbedding | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.input = input
        self.output = output
        # A kernel that computes the whole of forward() on integers (see runtime), or None: then it is simulated.
        self.kernel: nn.Module | None = None
        # Kept out of the module tree: the table is saved, cast and moved once, by the embedding.
        object.__setattr__(self, "tied", tied)

    def _weight(self) -> Weight:
        if self.weight is not None:
            return self.weight
        source: QuantEmbedding = self.tied  # type: ignore[assignment]
        return source.weight

    @property
    def out_features(self) -> int:
        return self._weight().shape[0]

    @property
    def in_features(self) -> int:
        return self._weight().shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            out: Tensor = self.kernel(x)
            return out
        if self.input is not None:
            x = self.input(x)
        bias = self.bias() if isinstance(self.bias, TunableBias) else self.bias
        weight = self._weight()(x.dtype)
        if self.tied is not None:
            weight = weight.to(x.device)  # a device map may put the head on another card than its table
        multiply = product if isinstance(self._weight(), TunableWeight) else F.linear
        return self.output(multiply(x, weight, None if bias is None else bias.to(x.dtype)))


class QuantNorm(_Biased):
    """RMSNorm or LayerNorm with a 16-bit gain, statistics in float32.

    Args:
        weight: provider of the effective gain ``[n]`` (Gemma's 1 + w included).
        bias: float32 ``[n]`` or None. eps: of the original.
        centre: subtract the mean (LayerNorm).
        input: quantizer of the residual sum the norm reads, or None where its producer has rounded it already.
    """

    def __init__(
        self,
        weight: Weight,
        bias: nn.Parameter | TunableBias | None,
        output: Quantizer,
        *,
        eps: float,
        centre: bool,
        input: Quantizer | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.input = input
        self.output = output
        self.eps = eps
        self.centre = centre
        self.kernel: nn.Module | None = None  # as in QuantLinear

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            out: Tensor = self.kernel(x)
            return out
        if self.input is not None:
            # The decoder layer adds this same tensor to the MLP's output: rounding it in place is what makes the
            # residual branch carry the codes that the norm sees.
            rounded = self.input(x.clone())
            x.copy_(rounded)
            x = rounded
        h: Tensor = _Normalise.apply(x.float(), self.weight(torch.float32), self.eps, self.centre)
        bias = self.bias() if isinstance(self.bias, TunableBias) else self.bias
        return self.output((h if bias is None else h + bias.float()).to(x.dtype))


class _Normalise(torch.autograd.Function):
    """``gain * (x - mean) / rms``, keeping for the backward pass one tensor of the size of ``x`` instead of five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, centre: bool) -> Tensor:
        if centre:
            x = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, gain)
        ctx.centre = centre
        return x * inverse * gain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, gain = ctx.saved_tensors
        compiled = compiled_passes(x, inverse.new_ones(())) if x.is_contiguous() and gain.is_contiguous() else None
        if compiled is not None:
            grad_x, grad_gain = compiled.norm_backward(grads[0].contiguous(), x, inverse, gain)
        else:
            normal, scaled = x * inverse, grads[0] * gain
            grad_x = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * inverse
            grad_gain = (grads[0] * normal).flatten(0, -2).sum(0)
        if ctx.centre:
            grad_x = grad_x - grad_x.mean(-1, keepdim=True)
        return grad_x, grad_gain if ctx.needs_input_grad[1] else None, None, None


class QuantEmbedding(nn.Module):
    """Table lookup with one 8-bit scale a row, rounded to one static grid; ``multiplier`` is Gemma's sqrt(hidden).

    ``dtype_anchor`` is one float that carries the dtype the model computes in: the integers have none, and
    transformers asks the model's parameters for it.
    """

    def __init__(
        self,
        weight: Weight,
        output: Quantizer,
        *,
        multiplier: float,
        padding_idx: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.weight = weight
        self.output = output
        self.dtype_anchor = nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)
        self.multiplier = multiplier
        self.padding_idx = padding_idx
        self.keeps_float32 = False  # kernels exchange grid values, which other dtypes do not hold

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.rows(ids)
        out: Tensor = self.output(rows if self.multiplier == 1.0 else rows * self.multiplier)
        return out if self.keeps_float32 else out.to(self.dtype_anchor.dtype)


class QuantActivation(nn.Module):
    """The true activation function on rounded input, rounded: a 256-entry lookup table on the device."""

    def __init__(self, function: nn.Module, output: Quantizer):
        super().__init__()
        self.function = function
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.function(x))
