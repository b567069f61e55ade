"""Tags of a quantized model on the Hub; apart from the card so that loading a model imports nothing of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..plan.presets import PRESETS

if TYPE_CHECKING:
    from ..config import MobileQuantConfig

# Every tag that depends on the bits; a card holds those of its own checkpoint only.
_OF_BITS = {*PRESETS, "int4", "int8"}


def tags_of(config: MobileQuantConfig) -> list[str]:
    """Method, preset, and the fewest bits of the matrices, for the Hub's search."""
    rules = config.resolve_scheme().weights
    bits = min(rules[role].bits for role in ("attention", "gate", "up", "down"))
    return ["mobilequant", config.preset, f"int{bits}", "integer-only", "npu"]


def merge_tags(theirs: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Both, each once; tags of other bits, as of an earlier push, are left out."""
    ours = list(ours)
    return list(dict.fromkeys([tag for tag in theirs if tag not in _OF_BITS or tag in ours] + ours))


def add_tags(model: Any, config: MobileQuantConfig) -> None:
    """What ``model.push_to_hub()`` writes into the card: transformers asks for nothing else of the card."""
    remove_tags(model)
    model.add_model_tags(tags_of(config))


def remove_tags(model: Any) -> None:
    """For a model that is no longer quantized, or quantized to other bits."""
    if model.model_tags is not None:
        left = {"mobilequant", "integer-only", "npu", *_OF_BITS}
        model.model_tags = [tag for tag in model.model_tags if tag not in left]
