"""The supported architectures. Adding one is adding an entry (an unknown architecture's error prints it filled in)."""

from __future__ import annotations

from .family import Family

FAMILIES: tuple[Family, ...] = (
    Family("llama", model_types=("llama",)),  # Llama, TinyLlama, SmolLM2
    Family("mistral", model_types=("mistral",)),
    Family("qwen2", model_types=("qwen2",)),
    Family("qwen3", model_types=("qwen3",), query_norm="q_norm", key_norm="k_norm"),
    Family("gemma", model_types=("gemma",), gain_offset=1.0),
    Family(
        "stablelm",
        model_types=("stablelm",),
        norm_kind="layer",
        unsupported={
            "qk_layernorm": "per-head LayerNorm of queries and keys",
            "use_parallel_residual": "parallel blocks",
        },
    ),
)
