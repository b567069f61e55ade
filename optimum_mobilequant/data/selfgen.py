"""Text that the model writes itself: for calibration where there is none, and for fine-tuning where there is little.

Without any text (LLM-QAT, Liu et al. 2023) every document begins with a token drawn at random, goes on with a few
tokens of which each is the most likely one, and then with tokens drawn from the model's own distribution: the first
makes documents differ, the next make them sensible, the last keep the model's own frequencies.

With some text every other batch begins its sequences with pieces of it and goes on with drawn tokens. What a small
model writes all by itself drifts away from what it will be used on; pieces hold it there, and cut elsewhere they are
continued otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..families import cache_name
from ..log import progress_bar
from .sources import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of a document that are chosen greedily behind its first (LLM-QAT, section 2.1: the first 3 to 5).
GREEDY = 4
BATCH = 32  # sequences written at a time
# Shares of a sequence between which the length of the given piece is drawn, for each batch.
GIVEN = (1 / 8, 5 / 8)

Rows = tuple[dict[str, Tensor], dict[str, Any]]


def start_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, bos: bool | str
) -> tuple[int | None, set[int]]:
    """The token that begins each document (None: none does) and those that end one.

    Args:
        bos: ``"auto"`` follows the tokenizer; without one, the model's config.

    Raises:
        ValueError: ``bos=True``, but neither tokenizer nor config names such a token.
    """
    config = model.config.get_text_config()
    named = getattr(config, "bos_token_id", None) if tokenizer is None else tokenizer.bos_token_id
    if bos is True and named is None:
        raise ValueError('bos=True, but the model has no beginning-of-sequence token; use bos="auto" or False')
    by_default = named is not None
    if tokenizer is not None and named is not None:
        by_default = tokenizer("a", verbose=False)["input_ids"][:1] == [named]
    ends = {getattr(tokenizer, "eos_token_id", None)}
    for source in (config, getattr(model, "generation_config", None)):
        found = getattr(source, "eos_token_id", None)
        ends |= set(found) if isinstance(found, list | tuple) else {found}
    return named if bos is True or (bos == "auto" and by_default) else None, {e for e in ends if e is not None}


def check_generates(model: PreTrainedModel, option: str) -> None:
    """Refuse a model that cannot write the text of a config's ``option``.

    Raises:
        ValueError: it has no language modelling head, or transformers says that it does not generate.
    """
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f'{option}="{SELF}" needs a model that can generate text, and {type(model).__name__} cannot; give text, '
            f"{option}=..."
        )


@torch.no_grad()
def write_sequences(
    model: PreTrainedModel,
    *,
    count: int,
    seq_len: int,
    seed: int,
    bos: int | None,
    ends: Iterable[int] = (),
    never: Iterable[int] = (),
    given: Tensor | None = None,
    given_every: int = 2,
    kept: Rows | None = None,
    keep: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Sequences that ``model`` writes: documents joined end to end, as in calibration data made of texts.

    A token of ``ends`` closes a document and is not written itself, for a stream of texts does not hold it either: the
    next document begins in its place, with ``bos`` if there is one. Batch n depends on (seed, n) and ``given`` alone.

    Args:
        model: float causal LM; written to by nothing.
        batch_size: sequences at a time, part of what decides the draws; None takes ``BATCH``.
        bos, ends: see :func:`start_tokens`. never: tokens that are not written, such as those of padding.
        given: int64 ``[n, seq_len]``; in batches 0, ``given_every``, 2 ``given_every`` ... each sequence begins with a
            piece of one of these rows, drawn at random. All others, and all where it is None, begin with a document
            of their own.
        kept: what ``keep`` was given last, to go on from there. keep: called behind each batch but the last.

    Returns:
        int64 ``[count, seq_len]``, on the CPU.

    Raises:
        ValueError: the logits are not finite, the vocabulary holds no ordinary token, or the model keeps no cache.
    """
    batch_size = batch_size or BATCH
    rows: list[Tensor] = [] if kept is None else [kept[0]["ids"]]
    first = 0 if kept is None else int(kept[1]["batches"])
    total = -(-count // batch_size)
    bar = progress_bar(range(first, total), "write text", total=total, initial=first, unit="batch", leave=True)
    for batch in bar:
        size = min(batch_size, count - batch * batch_size)
        writer = _Writer(model, size, seed * 1_000_003 + batch, bos, set(ends), set(never))
        rows.append(writer.write(seq_len, None if batch % given_every else given))
        if keep is not None and batch + 1 < total:
            keep({"ids": torch.cat(rows)}, {"batches": batch + 1})
    return torch.cat(rows)


class _Writer:
    """One batch of sequences; ``age`` counts the tokens of each row's present document."""

    def __init__(
        self, model: PreTrainedModel, size: int, seed: int, bos: int | None, ends: set[int], never: set[int]
    ) -> None:
        self.model = model
        self.bos = bos
        vocabulary = model.config.get_text_config().vocab_size
        special = {token for token in {*ends, *never, bos} if token is not None and 0 <= token < vocabulary}
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.hidden = torch.tensor(sorted(special - ends), dtype=torch.long)  # never chosen
        self.openers = torch.tensor([token for token in range(vocabulary) if token not in special])
        if not len(self.openers):
            raise ValueError(f"all {vocabulary} tokens of the vocabulary are special ones; give calibration text")
        # On the CPU: the draws are the same wherever the model computes.
        self.generator = torch.Generator().manual_seed(seed)
        self.age = torch.zeros(size, dtype=torch.long)

    def write(self, length: int, given: Tensor | None) -> Tensor:
        device = next(self.model.parameters()).device
        if given is None:
            ids = [self.open(torch.ones_like(self.age, dtype=torch.bool), self.age.clone())[:, None]]
        else:
            ids = [self.piece(given)]
            self.age += ids[0].shape[1]
        cache: Any = None
        name = cache_name(self.model)
        for _ in range(length - ids[0].shape[1]):
            out = self.model(input_ids=ids[-1].to(device), use_cache=True, **{name: cache})
            cache = getattr(out, name, None)
            if cache is None:
                raise ValueError(
                    f"{type(self.model).__name__} keeps no cache of keys and values; give calibration text"
                )
            ids.append(self.next(out.logits[:, -1].float().cpu())[:, None])
        return torch.cat(ids, dim=1)

    def piece(self, given: Tensor) -> Tensor:
        """What the batch begins with: as long for all rows, which read and write in step."""
        draw = partial(torch.randint, generator=self.generator)
        low, high = (max(1, int(share * given.shape[1])) for share in GIVEN)
        size = int(draw(low, high + 1, (1,)))
        first = int(draw(given.shape[1] - size + 1, (1,)))
        return given[draw(len(given), self.age.shape), first : first + size]

    def next(self, logits: Tensor) -> Tensor:
        if not torch.isfinite(logits).all():
            raise ValueError("the model's logits are not finite: its weights are damaged, or its dtype is too narrow")
        logits[:, self.hidden] = -torch.inf
        likely = logits.argmax(-1)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]
        # Behind BOS comes the random token; then the greedy ones.
        written = self.age - int(self.bos is not None)
        token = torch.where(written <= GREEDY, likely, drawn)
        ended = torch.isin(token, self.ends)
        return self.open(ended | (written == 0), token)

    def open(self, where: Tensor, token: Tensor) -> Tensor:
        """``token`` with the beginnings of documents put in: BOS where one ended, the random token behind a BOS."""
        random = self.openers[torch.randint(len(self.openers), token.shape, generator=self.generator)]
        behind_bos = self.age == 1 if self.bos is not None else torch.zeros_like(where)
        begins = where & ~behind_bos
        token = torch.where(where, random, token)
        if self.bos is not None:
            token = torch.where(begins, self.bos, token)
        self.age = torch.where(begins, 0, self.age) + 1
        return token
