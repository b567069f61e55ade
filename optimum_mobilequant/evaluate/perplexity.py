"""Perplexity on one text, under one fixed protocol, so that two numbers from here can always be compared."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ..data.overlap import warn_if_calibrated_on
from ..log import progress_bar
from ..nn.prefix import logits_behind, prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PerplexityResult:
    """One measurement.

    Attributes:
        perplexity: ``exp(nll)``, per token.
        word_perplexity: ``exp(nll * text tokens / words)``: the mean loss charged to every token of the text, the
            unscored ones included, and shared out over the words. None if token ids were given instead of text.
        tokens: next-token predictions scored.
        words: words of the text, separated by white space. None if token ids were given.
        seconds: wall time of the forward passes.
        nll: mean negative log-likelihood per scored token, in nats.
    """

    perplexity: float
    word_perplexity: float | None
    tokens: int
    words: int | None
    seconds: float
    nll: float


def token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text_or_ids: str | Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Token ids of a text without special tokens, or the given ones checked against the vocabulary; int64 [tokens].

    Every measurement comes through here: it is where text that the model was calibrated on is noticed.
    """
    if isinstance(text_or_ids, str):
        if tokenizer is None:
            raise ValueError("perplexity of a text needs a tokenizer; give one, or token ids")
        # verbose=False: the text is longer than the model's context by design, so no warning about its length
        ids = torch.tensor(tokenizer(text_or_ids, add_special_tokens=False, verbose=False)["input_ids"])
    else:
        try:
            ids = torch.as_tensor(text_or_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"give one text or one flat list of token ids ({error})") from error
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"token ids must be one flat list of whole numbers, got {ids.dtype} {list(ids.shape)}")
    vocabulary = model.config.get_text_config().vocab_size
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has {vocabulary} "
            "entries; use the tokenizer that belongs to the model"
        )
    ids = ids.long().cpu()
    warn_if_calibrated_on(model, ids)
    return ids


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text_or_ids: str | Sequence[int] | torch.Tensor,
    *,
    seq_len: int = 256,
    bos: bool = False,
    prefix: Sequence[int] = (),
    batch_size: int = 8,
    progress: bool = True,
) -> PerplexityResult:
    """Perplexity of a causal language model on one text.

    Protocol: the text is tokenised once, without special tokens, and cut into chunks of ``seq_len`` that do not
    overlap and do not see each other; a last chunk that is not full is left out. In each chunk every token but the
    first is predicted from those before it. With ``bos`` a chunk is the beginning-of-sequence token and
    ``seq_len - 1`` tokens of text, all of them predicted. Losses are computed in float32 and summed in float64.

    Args:
        model: a causal language model; it is put in eval mode for the measurement, and back.
        tokenizer: the model's tokenizer; None if token ids are given and ``bos`` is off.
        text_or_ids: the text, or its token ids, int [tokens].
        seq_len: length of the model's input, from 2 to the model's number of positions.
        bos: see above.
        prefix: ids of tokens that a float model reads before each chunk, unscored: the control for a quantized model
            with that prefix, which needs no such argument.
        batch_size: chunks per forward pass; a matter of memory, not of the result.
        progress: show a progress bar.

    Raises:
        ValueError: text shorter than one chunk, ids outside the vocabulary, ``seq_len`` the model does not have, a
            second prefix, or a loss that is not finite.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if seq_len < 2 or batch_size < 1:
        raise ValueError(f"seq_len must be at least 2 and batch_size at least 1, not {seq_len} and {batch_size}")
    if (own := prefix_length(model)) and prefix:
        raise ValueError(f"the model has a prefix of {own} tokens of its own; leave out prefix=...")
    if positions is not None and seq_len > positions - (before := own or len(prefix)):
        behind = f" behind a prefix of {before}" if before else ""
        raise ValueError(f"seq_len {seq_len} is beyond the model's {positions} positions{behind}; lower seq_len")
    first = getattr(tokenizer, "bos_token_id", None) if bos else None
    if bos and first is None:
        raise ValueError("bos=True needs a tokenizer with a beginning-of-sequence token; use bos=False")
    ids = token_ids(model, tokenizer, text_or_ids)
    stride = seq_len - 1 if bos else seq_len
    if ids.numel() < stride:
        raise ValueError(
            f"the text has {ids.numel()} tokens, but one chunk takes {stride}; give more text or a smaller seq_len"
        )
    chunks = ids[: ids.numel() // stride * stride].view(-1, stride)
    if first is not None:
        chunks = torch.cat([torch.full((chunks.shape[0], 1), first), chunks], dim=1)

    device = next(chain(model.parameters(), model.buffers())).device
    total, scored = 0.0, 0
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        with torch.no_grad():
            for batch in progress_bar(chunks.split(batch_size), "perplexity", unit="batch", show=progress):
                batch = batch.to(device)
                logits = logits_behind(model, prefix, batch)[:, :-1]
                targets = batch[:, 1:].to(logits.device)
                loss = cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.flatten(), reduction="none")
                total += loss.double().sum().item()
                if not math.isfinite(total):
                    raise ValueError(
                        f"the loss is not finite after {scored + targets.numel()} of {chunks[:, 1:].numel()} tokens; "
                        "the model's weights or activation ranges are broken, or its dtype is too narrow"
                    )
                scored += targets.numel()
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start

    nll = total / scored
    words = len(text_or_ids.split()) if isinstance(text_or_ids, str) else None
    per_word = nll * ids.numel() / words if words else None
    return PerplexityResult(
        perplexity=exp_or_inf(nll),
        word_perplexity=None if per_word is None else exp_or_inf(per_word),
        tokens=scored,
        words=words,
        seconds=seconds,
        nll=nll,
    )


def exp_or_inf(value: float) -> float:
    """``math.exp`` that says inf where the number has no float; a broken model deserves a number, not a crash."""
    return math.exp(value) if value < 709 else math.inf
