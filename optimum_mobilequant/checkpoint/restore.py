"""Turn a quantized model back into a plain transformers model with the rounded weights as floats."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..log import get_logger
from ..nn import QuantActivation, QuantEmbedding, Quantizer, QuantLinear, QuantNorm
from ..nn.attention import check_call
from ..nn.prefix import remove_prefix
from ..nn.quantizer import quantize_output
from ..nn.shift import remove_shift
from ..plan import Plan

logger = get_logger(__name__)


@torch.no_grad()
def restore_float(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    """Replace every quantized module by the original kind, in place.

    Weights keep their rounded values, transforms stay folded in; activations are no longer rounded. A tied head stays
    tied. A plain model has no place for a prefix: it is left out, with a warning.

    Args:
        dtype: of the restored weights.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        blank = type(model)(config)
    quantized = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantNorm | QuantEmbedding | QuantActivation)
    ]
    offset = plan.family.gain_offset
    module: Any
    for path, module in quantized:
        if isinstance(module, QuantActivation):
            model.set_submodule(path, module.function)
            continue
        plain: Any = blank.get_submodule(path)
        weight = module._weight() if isinstance(module, QuantLinear) else module.weight
        values = weight(torch.float32) - (offset if isinstance(module, QuantNorm) else 0.0)
        plain.to_empty(device=values.device)
        plain.weight = nn.Parameter(values.to(dtype))
        if getattr(module, "bias", None) is not None:
            plain.bias = nn.Parameter(module.bias.to(dtype))
        if isinstance(module, QuantEmbedding) and hasattr(plain, "embed_scale"):
            plain.embed_scale.fill_(module.multiplier)
        model.set_submodule(path, plain)
    remove_shift(model)
    if remove_prefix(model):
        logger.warning(
            f"the model read every text behind the tokens {list(plan.prefix)}, which a plain model has no cache for: "
            "put them in front of each text to get what the quantized model computed"
        )
    for left in model.modules():
        for name, child in list(left.named_children()):
            if isinstance(child, Quantizer):
                delattr(left, name)
        for key, hook in list(left._forward_hooks.items()):
            if hook is quantize_output:
                del left._forward_hooks[key]
        for key, pre_hook in list(left._forward_pre_hooks.items()):
            if pre_hook is check_call:
                del left._forward_pre_hooks[key], left._forward_pre_hooks_with_kwargs[key]
    model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    del model._tied_weights_keys, model.all_tied_weights_keys  # back to the class's
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
