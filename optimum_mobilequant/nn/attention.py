"""Attention on static integers, plugged into transformers' attention interface under the name ``mobilequant``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


NAME = "mobilequant"


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,  # the interface passes options of other implementations
) -> tuple[Tensor, Tensor]:
    """Attention with every tensor rounded by the quantizers that ``swap`` hung on ``module``.

    The cache holds keys before ``key_rotated`` rounds them and values that ``v_proj`` has rounded: rounding is
    elementwise and static, so codes computed at each read equal codes stored once.

    Args:
        query: ``[batch, heads, q, head_dim]``. key, value: ``[batch, kv_heads, k, head_dim]``.
        attention_mask: additive float ``[batch, 1, q, k]`` (0 visible, very negative hidden) or None.

    Returns:
        context ``[batch, q, heads, head_dim]`` and probabilities ``[batch, heads, q, k]``.
    """
    query, key = module.query_rotated(query), module.key_rotated(key)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # 1/sqrt(D) belongs to the requantization multiplier of the product.
    scores = module.scores(torch.matmul(query, key.transpose(2, 3)) * scaling)
    if attention_mask is not None:
        # A hidden position gets probability 0 exactly, whatever the score range: the integer softmax flushes it too.
        scores = scores.masked_fill(attention_mask < 0, torch.finfo(scores.dtype).min)
    probabilities = module.probabilities(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
    context = module.context(torch.matmul(probabilities, value).transpose(1, 2).contiguous())
    return context, probabilities


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, eager_mask)
