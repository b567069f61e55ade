"""A saved checkpoint as exporters read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..graph import Graph
from ..graph.load import load_graph, method_of
from ..plan import Plan, refuse_formats
from .options import DEFAULT_CONTEXT, DEFAULT_PROMPT_LENGTH, ExportOptions

# Of matrices; gains have 16.
EXPORTED_BITS = (4, 8)


@dataclass(frozen=True)
class Source:
    """A loaded checkpoint.

    Args:
        folder: where it lies.
        method: ``"mobilequant"`` or ``"quanto"`` (weights only: every other tensor is a float).
        model: what the graph computes, float32, in eval mode.
        plan, graph: its plan and its integer graph.
    """

    folder: Path
    method: str
    model: PreTrainedModel
    plan: Plan
    graph: Graph

    @torch.no_grad()
    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 to ``length - 1`` of the cache, those of a prefix included, float32
        ``[length, rotary_dims / 2]`` each; already on the grid of their encoding, where they have one."""
        rotary: Any = self.model.get_submodule(self.plan.family.rotary)
        # The module counts from behind the prefix.
        tables = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None] - len(self.plan.prefix))
        half = self.graph.facts["rotary_dims"] // 2
        cos, sin = (table[0, :, :half].float().contiguous() for table in tables)
        return cos, sin


def open_checkpoint(folder: Path) -> Source:
    """Load a checkpoint and lay out its integer graph.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: a float model or one of another method; damaged files; scales that are not positive; weights of
            bits that no exported format has.
    """
    loaded = load_graph(folder)
    check_weight_bits(loaded.plan)
    return Source(folder, loaded.method, loaded.model, loaded.plan, loaded.graph)


def check_weight_bits(plan: Plan) -> None:
    """Refuse matrices that the exported formats have no integer type for.

    Raises:
        ValueError: names them and the fix.
    """
    refuse_formats(plan)
    odd = [name for name, spec in plan.weights.items() if spec.role != "gain" and spec.rule.bits not in EXPORTED_BITS]
    if odd:
        found = sorted({plan.weights[name].rule.bits for name in odd})
        raise ValueError(
            f"{', '.join(odd[:3])}{f' and {len(odd) - 3} more' if len(odd) > 3 else ''} have "
            f"{' or '.join(map(str, found))}-bit weights, which no target of an export computes with "
            "(they are for storage on CPU and GPU): quantize again with 4 or 8 bits there, e.g. bit_choices=[4, 8]"
        )


def resolve_options(folder: Path, *, context: int | None = None, prompt_length: int | None = None) -> ExportOptions:
    """Sizes of the graphs for this model, from its ``config.json`` alone.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: a float model or one of another method; a context beyond the model's positions or its attention
            window, or a prompt length that does not fit in it behind a prefix.
    """
    method_of(folder)
    config = AutoConfig.from_pretrained(folder).get_text_config()
    positions, window = getattr(config, "max_position_embeddings", None), attention_window(config)
    limits = {"positions": positions, "tokens in its attention window": window}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if context is None:
        context = min(DEFAULT_CONTEXT, *known.values())
    for name, limit in known.items():
        if context > limit:
            raise ValueError(f"context {context} is more than the model's {limit} {name}: give at most {limit}")
    prefix = prefix_tokens(config)
    if prompt_length is None:
        prompt_length = min(DEFAULT_PROMPT_LENGTH, max(1, context // 2), max(1, context - prefix))
    if prefix and prefix > context - max(prompt_length, 2):
        raise ValueError(
            f"the first {prefix} of {context} tokens of context belong to the checkpoint's prefix, which leaves no "
            f"room for {prompt_length} more: give a larger context or a smaller prompt length"
        )
    return ExportOptions(context=context, prompt_length=prompt_length)


def prefix_tokens(config: Any) -> int:
    """Number of tokens that the checkpoint of a model config keeps in its cache before every text."""
    stored = getattr(config, "quantization_config", None)
    tokens = stored.get("prefix") if isinstance(stored, Mapping) else getattr(stored, "prefix", None)
    return len(tokens) if isinstance(tokens, list) else 0


def attention_window(config: Any) -> int | None:
    """Tokens a layer can look back to, where the model limits it; None if all layers see everything.

    The graphs' mask is one for all layers, so a context within the window is what makes them exact.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)
