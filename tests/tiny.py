"""Tiny random models of every supported family, and token ids to calibrate them on.

Gains and biases are random too: with gains of 1 and biases of 0 a transform that forgets them would look exact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from optimum_mobilequant import MobileQuantConfig
from optimum_mobilequant.families import family_of, geometry_of
from optimum_mobilequant.plan import PRESETS, Plan, build_plan

ROOT = Path(__file__).parents[1]
VOCAB = 96
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_VARIANTS = {
    "llama": (LlamaConfig, {}),
    "llama-gqa": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama-mqa": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama-tied": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-bias": (LlamaConfig, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "stablelm": (
        StableLmConfig,
        {
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "use_qkv_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
}
VARIANTS = tuple(_VARIANTS)
# One of each architecture; the other variants differ in head counts, biases or tying only.
FAMILIES = ("llama-gqa", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "stablelm")


def build(variant: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Random float32 model in eval mode, weights large enough for attention and logits to be far from uniform."""
    kind, options = _VARIANTS[variant]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**_SIZES, **options, **changes}), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                deviation = 0.5 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.copy_(noise * deviation)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.2)
            else:
                gain = torch.rand(parameter.shape, generator=generator) + 0.5
                gain[:2] *= 4.0  # channels that stand out, for the transforms to level
                parameter.copy_(gain - 1.0 if model.config.model_type == "gemma" else gain)
    return model.eval()


def plan_of(model: PreTrainedModel, preset: str = "w8a8", overrides: dict | None = None) -> Plan:
    family = family_of(model)
    return build_plan(family, geometry_of(model, family), PRESETS[preset], overrides)


def token_ids(count: int = 24, length: int = 16, *, seed: int = 0) -> list[list[int]]:
    """Random token sequences, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


def config(preset: str = "w8a8", **options: object) -> MobileQuantConfig:
    """Small settings: 8 sequences of 16 tokens, rounding only unless the options say otherwise."""
    defaults = {
        "dataset": token_ids(),
        "recipe": "rtn",
        "effort": "none",
        "samples": 8,
        "seq_len": 16,
        "batch_size": 4,
    }
    if options.get("recipe", "rtn") != "rtn":
        defaults |= {"effort": "light", "steps": 4}
    return MobileQuantConfig(preset, **{**defaults, **options})


def probe_ids(batch: int = 2, length: int = 12, seed: int = 7) -> torch.Tensor:
    """Token ids to compare models on, int64 ``[batch, length]``."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=probe_ids() if ids is None else ids, use_cache=False).logits


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that can import this package and these helpers."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
