"""Random models of any shape, float and quantized, made in seconds: speed and memory depend on the shape alone."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from optimum_mobilequant import MobileQuantConfig
from optimum_mobilequant.checkpoint import skeleton
from optimum_mobilequant.hf_quantizer import attach, plan_of
from optimum_mobilequant.nn import QWeight, quantizers_of

# Largest magnitude that an activation of a role is given room for; 8 elsewhere.
_RANGES = {"residual": 64.0, "scores": 48.0, "embedding": 2.0, "mlp_out": 16.0, "attention_out": 16.0}


def tinyllama(layers: int = 22) -> LlamaConfig:
    """The shape of TinyLlama-1.1B."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip


def random_float(config: PreTrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A float model with random weights, in eval mode, with transformers' eager attention."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def random_quantized(
    config: PreTrainedConfig, preset: str, *, seed: int = 0, backend: str = "auto"
) -> PreTrainedModel:
    """A quantized model with random integers, as ``quantize`` would return it; no float weight is ever allocated.

    Args:
        preset: as in ``MobileQuantConfig``. backend: as in ``set_backend``.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    options = MobileQuantConfig(preset, backend=backend)
    plan = plan_of(model, options)
    skeleton(model, plan)
    model.to_empty(device="cpu")
    rotary = model.get_submodule(plan.family.rotary)
    for name, buffer in type(rotary)(config).named_buffers():  # type: ignore[call-arg]
        rotary.get_buffer(name).copy_(buffer)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.zero_()  # biases, and the anchor of the dtype
    for module in model.modules():
        if isinstance(module, QWeight):
            _fill(module, generator)
    for quantizer in quantizers_of(model):
        spec = quantizer.spec
        if spec.fixed is not None:
            quantizer.set(torch.tensor(spec.fixed[0]), torch.tensor(spec.fixed[1]))
            continue
        grid, reach = spec.grid, _RANGES.get(spec.role, 8.0)
        quantizer.set(torch.tensor(2 * reach / grid.qmax), torch.tensor((grid.qmax + 1) // 2))
    model.eval()
    attach(model, options)
    return model


def _fill(weight: QWeight, generator: torch.Generator) -> None:
    """Random codes with a scale that keeps the size of what passes through."""
    if len(weight.shape) == 1:
        weight._codes.fill_(2**14)
        weight._scale.fill_(2.0**-14)
        return
    for tensor in (*weight.parameters(), *weight.buffers()):
        if tensor.dtype in (torch.int8, torch.uint8):
            low, high = torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max
            tensor.random_(low, high + 1, generator=generator)
        elif tensor.dtype == torch.int32:
            tensor.zero_()
    if weight.rule.bits == 4:
        weight._shift.fill_(8)
    deviation = 2 ** (weight.rule.bits - 1) / 3**0.5
    weight._scale.fill_(1 / (deviation * weight.shape[1] ** 0.5))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers: what the model keeps in memory, scales and constants included."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
