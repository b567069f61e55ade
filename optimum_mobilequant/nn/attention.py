"""Attention on static integers, plugged into transformers' attention interface under the name ``mobilequant``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from .quantizer import Mode
from .tuned_attention import Encoding, attend

NAME = "mobilequant"


def quantized_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,  # the interface passes options of other implementations
) -> tuple[Tensor, Tensor | None]:
    """Attention with every tensor rounded by the quantizers that ``swap`` hung on ``module``.

    The cache holds keys before they are shifted (:mod:`.shift`) and ``key_rotated`` rounds them, and values that
    ``v_proj`` has rounded: both are elementwise and static, so codes computed at each read equal codes stored once. A
    prefix (:mod:`.prefix`) stands before them.

    Args:
        query: ``[batch, heads, q, head_dim]``. key, value: ``[batch, kv_heads, k, head_dim]``.
        attention_mask: additive float ``[batch, 1, q, k]`` (0 visible, very negative hidden) or None.

    Returns:
        context ``[batch, q, heads, head_dim]`` and probabilities ``[batch, heads, q, k]`` (None while tuning on CPUs).
    """
    if (shift := getattr(module, "key_shift", None)) is not None:
        key = key + shift.value(module).to(key.dtype)
    query, key = module.query_rotated(query), module.key_rotated(key)
    if (prefix := getattr(module, "prefix", None)) is not None:
        key, value, attention_mask = prefix.before(module, key, value, attention_mask)
    if _tunes(module, query):
        encodings = (Encoding(q.scale, q.zero_point, q.spec.grid) for q in (module.scores, module.probabilities))
        context = attend(query, key, value, attention_mask, scaling, *encodings)
        return module.context(context.transpose(1, 2).contiguous()), None
    batch, heads, length, head_dim = query.shape
    # The query heads that share a KV head are rows of one product: nothing is repeated.
    grouped = (batch, key.shape[1], heads // key.shape[1] * length)
    # 1/sqrt(D) belongs to the requantization multiplier of the product.
    scores = torch.matmul(query.reshape(*grouped, head_dim), key.transpose(2, 3)) * scaling
    scores = module.scores(scores.view(batch, heads, length, -1))
    if attention_mask is not None:
        # The mask's hidden value absorbs any score, so a hidden position gets probability 0 exactly. In float32: a
        # float16 sum would overflow to -inf, and rows of padding, all hidden, to NaN.
        scores = scores.float() + attention_mask
    probabilities = module.probabilities(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
    context = torch.matmul(probabilities.view(*grouped, -1), value).view(batch, heads, length, -1)
    return module.context(context.transpose(1, 2).contiguous()), probabilities


def _tunes(module: Any, query: Tensor) -> bool:
    """Whether the form for tuning may be taken: on CPUs, unless somebody looks at the tensors it does not show."""
    if query.dtype != torch.float32 or query.device.type != "cpu" or module.scores.mode is not Mode.LEARN:
        return False
    return not (module.scores._forward_hooks or module.probabilities._forward_hooks)


def check_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module, for what would be skipped or end in a message about reshaping.

    Raises:
        RuntimeError: the model was switched to another implementation, which would skip the quantizers.
        ValueError: there is no token to attend with.
    """
    if module.config._attn_implementation != NAME:
        raise RuntimeError(
            f'attention implementation "{module.config._attn_implementation}" would skip the quantized attention; '
            f'call model.set_attn_implementation("{NAME}")'
        )
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if hidden.numel() == 0:
        raise ValueError(
            f"no tokens: the ids have shape {list(hidden.shape[:2])}. Give at least one: BOS stands for an empty text"
        )


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, eager_mask)
