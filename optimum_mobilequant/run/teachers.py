"""The models that a student imitates while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

FLOAT = "float"  # the float model that is being quantized, in a list of teachers


@dataclass(frozen=True)
class Teacher:
    """One teacher.

    Attributes:
        name: as given.
        weight: relative to the others', positive.
        model: float32, in eval mode, without gradients; None stands for the float model itself.
    """

    name: str
    weight: float
    model: PreTrainedModel | None

    def module(self, own: nn.Module) -> nn.Module:
        """The teacher on the device of ``own``, the float model itself."""
        if self.model is None:
            return own
        device = next(own.parameters()).device
        return nn.Module.to(self.model, device=device)


def load_teachers(
    given: Sequence[str | dict[str, Any]] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int,
) -> list[Teacher]:
    """Check all teachers, then load them.

    Args:
        given: see :class:`~.config.MobileQuantConfig`; None is the float model alone.
        tokenizer: of ``model``; None compares sizes of vocabularies only, unless one lies beside the model.

    Raises:
        ValueError: a teacher with another vocabulary, that is quantized, named twice, or has too few positions.
        OSError: no such model.
    """
    rows = [
        (row, 1.0) if isinstance(row, str) else (row["model"], float(row.get("weight", 1.0)))
        for row in given or [FLOAT]
    ]
    names = [name for name, _ in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'teacher "{twice[0]}" is named twice; give it a larger weight instead')
    others = [name for name in names if name != FLOAT]
    if others:
        own = tokenizer if tokenizer is not None else _tokenizer(getattr(model.config, "_name_or_path", ""))
        for name in others:
            _check(name, model, own, seq_len)
    return [Teacher(name, weight, None if name == FLOAT else _load(name)) for name, weight in rows]


def _check(name: str, model: PreTrainedModel, own: PreTrainedTokenizerBase | None, seq_len: int) -> None:
    config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f'teacher "{name}" is quantized; give a float model')
    text = config.get_text_config()
    size = model.config.get_text_config().vocab_size
    if text.vocab_size != size:
        raise ValueError(
            f'teacher "{name}" has a vocabulary of {text.vocab_size} tokens and the model one of {size}: a student '
            "can only imitate a model of its own vocabulary; take another teacher"
        )
    theirs = _tokenizer(name)
    if own is None or theirs is None:
        logger.warning(
            f'no tokenizer to compare for teacher "{name}": only the sizes of the vocabularies were compared'
        )
    elif (ours := own.get_vocab()) != (other := theirs.get_vocab()):
        example = next(token for token in sorted({*ours, *other}) if ours.get(token) != other.get(token))
        raise ValueError(
            f'teacher "{name}" has another vocabulary: the token {example!r} has id {other.get(example)} there and '
            f"{ours.get(example)} here; take a teacher with the same tokenizer"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise ValueError(f'teacher "{name}" has {positions} positions, fewer than seq_len={seq_len}; lower seq_len')


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(name) if name else None
    except (OSError, ValueError):
        return None


def _load(name: str) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(f'teacher "{name}" lacks {len(missing)} weights, among them {missing[0]}')
    teacher: PreTrainedModel = model.eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher
