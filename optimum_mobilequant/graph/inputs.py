"""What the integer graph takes beside token ids: rotary tables as codes, and which position sees which."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..hf_quantizer import plan_of
from ..nn.prefix import prefix_length


class StepInputs(NamedTuple):
    """Inputs of one run.

    Attributes:
        cos, sin: int16 codes (Q1.14), ``[batch, 1, sequence, rotary_dims / 2]``.
        visible: bool ``[batch, 1, sequence, total]``, the prefix' slots first.
    """

    cos: Tensor
    sin: Tensor
    visible: Tensor


@torch.no_grad()
def rotary_tables(model: PreTrainedModel, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of cos and sin from the model's own rotary module, so that its scaling of positions is kept.

    Args:
        model: a quantized model. positions: int64 ``[batch, sequence]``, counted from behind its prefix.

    Returns:
        Two int16 tensors ``[batch, 1, sequence, rotary_dims / 2]``, values times 2**14.
    """
    rotary: Any = model.get_submodule(plan_of(model, model.config.quantization_config).family.rotary)
    scale = rotary.output.scale
    probe = torch.zeros(1, dtype=torch.float32, device=scale.device)  # gives the dtype and the device
    tables = []
    for table in rotary(probe, positions.to(scale.device)):
        codes = torch.div(table, scale).round().to(torch.int16).cpu()
        half = codes.shape[-1] // 2
        if not torch.equal(codes[..., :half], codes[..., half:]):
            raise ValueError("the rotary module does not repeat its table for both halves of a head")
        tables.append(codes[..., :half].unsqueeze(1).contiguous())
    return tables[0], tables[1]


def attention_window(model: PreTrainedModel) -> int | None:
    """Number of positions a token sees, itself included, or None for all before it.

    Raises:
        ValueError: layers that differ in this; the graph has one mask for all of them.
    """
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    if kinds == {"full_attention"} or window is None:
        return None
    if kinds != {"sliding_attention"}:
        raise ValueError(
            f"layers of this model attend in different ways ({', '.join(sorted(kinds))}); the integer graph has one "
            "mask for all layers"
        )
    return int(window)


class DecoderInputs:
    """Makes :class:`StepInputs` from token ids and a padding mask; the tables are computed once for all positions.

    Args:
        model: a quantized model. With a prefix, positions and cached tokens here are those of the text behind it.
        positions: length of the tables; None for all that the model has.
    """

    def __init__(self, model: PreTrainedModel, positions: int | None = None):
        self.window = attention_window(model)
        self.prefix = prefix_length(model)
        self.positions = positions or int(model.config.get_text_config().max_position_embeddings) - self.prefix
        cos, sin = rotary_tables(model, torch.arange(self.positions)[None])
        self.cos, self.sin = cos[0, 0], sin[0, 0]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_length: int = 0) -> StepInputs:
        """Inputs of a run over ``input_ids`` after ``past_length`` cached tokens.

        A padded position counts for nothing: positions are counted over the others, as transformers' ``generate``
        does.

        Args:
            input_ids: int64 ``[batch, sequence]``.
            attention_mask: 1 for a token, 0 for padding on either side, ``[batch, past_length + sequence]``; None for
                no padding.

        Raises:
            ValueError: a mask of another shape, or a text longer than the tables.
        """
        batch, sequence = input_ids.shape
        total = past_length + sequence
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.bool)
        if tuple(attention_mask.shape) != (batch, total):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, but {batch} texts of {past_length} cached and "
                f"{sequence} new tokens need [{batch}, {total}]"
            )
        real = attention_mask.to(torch.bool)
        positions = (real.to(torch.int64).cumsum(-1) - 1).clamp(min=0)[:, past_length:]
        if sequence and int(positions.max()) >= self.positions:
            raise ValueError(
                f"the text reaches position {int(positions.max())}, but there are {self.positions}; give less text"
            )
        column = torch.arange(total)
        row = column[past_length:, None]
        seen = column <= row
        if self.window is not None:
            seen = seen & (column > row - self.window)
        visible = F.pad(seen[None, None] & real[:, None, None, :], (self.prefix, 0), value=True)
        return StepInputs(self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1), visible)
