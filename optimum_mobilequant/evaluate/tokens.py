"""Token-adaptive precision: tokens that draw little attention are rounded to 4 bits instead of 8. CPU and GPU only.

Squat (Shen et al. 2024) scores a token by the attention logits between its query and the first key, and rounds the
activations of the lowest tokens more coarsely in the next layer. Which tokens these are is known only when the text
is: a static graph has no place for the choice, so this is a way to run a model here, never part of a checkpoint, a
target or an export.

Squat ranks the tokens of a batch against each other, so that a token's precision depends on those behind it. Here each
layer has one threshold, the quantile of its scores on calibration text: a token depends on nothing that comes later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..hf_quantizer import plan_of
from ..nn import Quantizer
from ..nn.dynamic import token_adaptive_run
from ..runtime.backend import simulated

LOW_BITS = 4
_RATIO = 17  # 15 steps of 17 are the 255 steps of an 8-bit grid


@dataclass
class TokenBits:
    """What was run coarsely.

    Args:
        thresholds: of each layer; a token with a lower score has 4 bits in the next layer.
        tokens, low: tokens seen by the layers behind the first, and those of them that had 4 bits.
    """

    thresholds: list[float]
    tokens: int = 0
    low: int = 0
    masks: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def share(self) -> float:
        """Of the tokens at 4 bits."""
        return self.low / self.tokens if self.tokens else 0.0


@contextmanager
def token_adaptive(
    model: PreTrainedModel, calibration: Tensor, share: float, *, batch_size: int = 8
) -> Iterator[TokenBits]:
    """Run a quantized model with ``share`` of its tokens at 4 bits, inside the ``with`` block.

    Behind the first layer the norm before the projections, rotated queries and keys, and values are rounded to 4 bits
    for tokens with low scores: a grid of every 17th step of the 8-bit one, so the codes stay 8-bit codes. The model
    runs in the simulation, without a KV cache.

    Args:
        model: what this package quantized or loaded.
        calibration: int64 ``[sequences, length]``, text that the thresholds are taken from.
        share: of the tokens, in [0, 1); 0 changes nothing.
        batch_size: sequences at a time while thresholds are measured.

    Raises:
        ValueError: not such a model, a share out of range, or activations of other than 8 bits at these places. In the
            block: a forward pass with cached keys; saving the model or building its integer graph.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be a number in [0, 1), not {share}")
    config: Any = getattr(model.config, "quantization_config", None)
    if getattr(config, "quant_method", None) != "mobilequant":
        raise ValueError("token-adaptive precision needs a model that optimum_mobilequant quantized or loaded")
    plan = plan_of(model, config)
    f, layers = plan.family, plan.geometry.layers
    places = ("input_norm_output", "query_rotated", "key_rotated", "value")
    names = {
        (i, place): name
        for i in range(layers)
        for place, name in zip(
            places,
            (
                f"{f.layer(i, f.input_norm)}.output",
                f"{f.layer(i, f.attention)}.query_rotated",
                f"{f.layer(i, f.attention)}.key_rotated",
                f"{f.layer(i, f.value)}.output",
            ),
            strict=True,
        )
    }
    if wide := [name for name in names.values() if plan.activations[name].bits != 8]:
        raise ValueError(f"{wide[0]} has {plan.activations[wide[0]].bits} bits, not 8; use a preset such as w8a8")
    modules = dict(model.named_modules())
    attention = [modules[f"{f.layer(i, f.attention)}.scores"] for i in range(layers)]
    with simulated(model), token_adaptive_run(model):
        state = TokenBits(_thresholds(model, attention, calibration, share, batch_size))
        handles = [module.register_forward_hook(_choose(state, i)) for i, module in enumerate(attention)]
        handles += [modules[name].register_forward_hook(_coarsen(state, i)) for (i, _), name in names.items() if i > 0]
        try:
            yield state
        finally:
            for handle in handles:
                handle.remove()


def coarse(x: Tensor, quantizer: Quantizer) -> Tensor:
    """``x`` on every 17th step of an 8-bit grid: 4 bits over the same range, and zero stays exact.

    Args:
        x: values on the grid of ``quantizer``.
    """
    zero = int(quantizer.zero_point)
    step = _RATIO * quantizer.scale
    # steps of 17 codes from zero that stay on the 8-bit grid
    low, high = math.ceil(-zero / _RATIO), (2**8 - 1 - zero) // _RATIO
    return ((x.float() / step).round().clamp(low, high) * step).to(x.dtype)


def token_scores(scores: Tensor) -> Tensor:
    """Sum over the heads of the logit with the first key: ``[batch, heads, q, k]`` -> ``[batch, q]``."""
    return scores[..., 0].float().sum(1)


@torch.no_grad()
def _thresholds(
    model: PreTrainedModel, attention: list[nn.Module], calibration: Tensor, share: float, batch_size: int
) -> list[float]:
    if share == 0:
        return [-math.inf] * len(attention)
    found: list[list[Tensor]] = [[] for _ in attention]

    def keep(index: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, args, out: found[index].append(token_scores(out).flatten().cpu())

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(attention)]
    try:
        for ids in calibration.split(batch_size):
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [float(torch.cat(parts).quantile(share)) if parts else -math.inf for parts in found]


def _choose(state: TokenBits, layer: int) -> Callable[[Any, Any, Tensor], None]:
    def hook(module: Any, args: Any, out: Tensor) -> None:
        if layer + 1 < len(state.thresholds):
            mask = token_scores(out) < state.thresholds[layer]
            state.masks[layer + 1] = mask
            state.tokens, state.low = state.tokens + mask.numel(), state.low + int(mask.sum())

    return hook


def _coarsen(state: TokenBits, layer: int) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        mask = state.masks[layer]
        spread = mask[:, None, :, None] if out.ndim == 4 else mask[..., None]
        if out.shape[-2] != mask.shape[-1]:
            raise ValueError("token-adaptive precision runs without a KV cache; call the model with use_cache=False")
        return torch.where(spread, coarse(out, module), out)

    return hook
