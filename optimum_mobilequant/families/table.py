"""The supported architectures. Adding one is adding an entry (an unknown architecture's error prints it filled in)."""

from __future__ import annotations

from .family import Family

_ATTENTION = {"attention_bias": ("query", "key", "value", "out")}

FAMILIES: tuple[Family, ...] = (
    Family(  # Llama, TinyLlama, SmolLM2
        "llama", model_types=("llama",), bias_flags={**_ATTENTION, "mlp_bias": ("gate", "up", "down")}
    ),
    Family("mistral", model_types=("mistral",)),
    Family("qwen2", model_types=("qwen2",)),
    Family("qwen3", model_types=("qwen3",), query_norm="q_norm", key_norm="k_norm", bias_flags=_ATTENTION),
    Family("gemma", model_types=("gemma",), gain_offset=1.0, bias_flags=_ATTENTION),
    Family(
        "stablelm",
        model_types=("stablelm",),
        norm_kind="layer",
        bias_flags={"use_qkv_bias": ("query", "key", "value")},
        unsupported={
            "qk_layernorm": "per-head LayerNorm of queries and keys",
            "use_parallel_residual": "parallel blocks",
        },
    ),
)
