"""Token sequences for calibration and training: one stream of tokens, cut, drawn at random, split in two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..log import get_logger
from .sources import dataset_kind, iter_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_POOL = 8  # the stream is read for this many times the tokens needed, so that the draw has something to choose from


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Token sequences of one run.

    Attributes:
        train: int64 [n, seq_len].
        validation: int64 [m, seq_len], from a part of the stream that ``train`` does not touch.
        sha256: hash of both.
        description: where they come from, for logs and model cards.
    """

    train: torch.Tensor
    validation: torch.Tensor
    sha256: str
    description: str


def _bos_prefix(tokenizer: PreTrainedTokenizerBase, bos: bool | str) -> list[int]:
    token = tokenizer.bos_token_id
    if bos is True and token is None:
        raise ValueError('bos=True, but the tokenizer has no beginning-of-sequence token; use bos="auto" or False')
    by_default = token is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [token]
    return [token] if bos is True or (bos == "auto" and by_default) else []


@dataclass(frozen=True, eq=False)
class TokenStream:
    """``ids`` is int64 [tokens]; ``documents`` counts those read, ``complete`` tells if the dataset ended."""

    ids: torch.Tensor
    documents: int
    complete: bool
    bos: bool


def token_stream(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    limit: int | None = None,
    bos: bool | str = "auto",
    split: str | None = None,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> TokenStream:
    """The first ``limit`` tokens of a dataset (None: all), its documents joined in order.

    Nothing is dropped or padded, however short a document is. ``bos`` puts the beginning-of-sequence token before each
    text: True, False, or ``"auto"`` for what the tokenizer does by itself. Token ids are taken as they are.

    Raises:
        ValueError: text without tokenizer, ``bos=True`` on token ids or without such a token, an id outside
            ``vocab_size``, or what [`iter_documents`] raises.
    """
    prefix: list[int] | None = None
    parts: list[torch.Tensor] = []
    total = documents = 0
    complete = True
    for document in iter_documents(dataset, split=split, text_column=text_column):
        documents += 1
        if isinstance(document, torch.Tensor):
            if bos is True:
                raise ValueError('bos=True works on texts; put the token into your token ids and use bos="auto"')
            new: Iterable[torch.Tensor] = (document,)
        else:
            if tokenizer is None:
                raise ValueError("the dataset is text, which needs a tokenizer; give one, or a list of token id lists")
            if prefix is None:
                prefix = _bos_prefix(tokenizer, bos)
            new = _tokenised(document, tokenizer, prefix)
        for ids in new:
            if vocab_size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise ValueError(
                    f"token ids reach from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has "
                    f"{vocab_size} entries; use the tokenizer that belongs to the model"
                )
            parts.append(ids)
            total += ids.numel()
            if limit is not None and total >= limit:
                break
        if limit is not None and total >= limit:
            complete = False
            break
    ids = torch.cat(parts)[:limit] if parts else torch.empty(0, dtype=torch.long)
    return TokenStream(ids, documents, complete, bool(prefix))


def _tokenised(
    pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]
) -> Iterator[torch.Tensor]:
    for piece in pieces:
        # verbose=False: a stream longer than the model's context is intended, so no warning about its length
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield torch.tensor([*prefix, *ids], dtype=torch.long)
        prefix = ()


def held_out_of(samples: int) -> int:
    """Validation sequences that go with so many training sequences."""
    return max(2, samples // 8)


def sha256_of(*parts: torch.Tensor) -> str:
    """Hash of shapes and contents."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.shape)).encode() + part.numpy().tobytes())
    return digest.hexdigest()


def calibration_data(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    bos: bool | str = "auto",
    split: str | None = None,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> CalibrationData:
    """Training and validation sequences of equal length from one dataset.

    The token stream is cut into chunks of ``seq_len`` without overlap. Its tail gives the validation chunks, one for
    each 8 of ``samples`` and at least 2; the rest gives the training chunks. Both are drawn at random. Only the first
    ``8 * (samples + validation) * seq_len`` tokens of the dataset are read, so the cost follows from the request
    and not from the size of the file; the choice depends on the data, the numbers here and ``seed`` alone.

    Args:
        dataset: see [`MobileQuantConfig`].
        tokenizer: needed for text.
        samples: training sequences wanted; fewer come back, with a warning, when the text is too short.
        seq_len: tokens per sequence.
        seed: of the random choice.
        bos, split, text_column, vocab_size: see [`token_stream`].

    Raises:
        ValueError: too little text for one training and one validation sequence, or what [`token_stream`] raises.
    """
    if samples < 1 or seq_len < 2:
        raise ValueError(f"samples must be at least 1 and seq_len at least 2, not {samples} and {seq_len}")
    held_out = held_out_of(samples)
    wanted = samples + held_out
    stream = token_stream(
        dataset,
        tokenizer,
        limit=_POOL * wanted * seq_len,
        bos=bos,
        split=split,
        text_column=text_column,
        vocab_size=vocab_size,
    )
    chunks = stream.ids[: stream.ids.numel() // seq_len * seq_len].view(-1, seq_len)
    count = chunks.shape[0]
    if count < 2:
        raise ValueError(
            f"the dataset has {stream.ids.numel()} tokens, but one training and one validation sequence take "
            f"{2 * seq_len} (2 x seq_len); give more text or a smaller seq_len"
        )
    if count < wanted:
        held_out = min(held_out, max(1, count // 9))
        logger.warning(
            f"the dataset has {stream.ids.numel()} tokens, enough for {count - held_out} of the {samples} training "
            f"sequences of {seq_len} tokens asked for, and {held_out} for validation"
        )
    tail = max(held_out, count * held_out // wanted)
    generator = torch.Generator().manual_seed(seed)
    train, validation = (
        part[torch.randperm(part.shape[0], generator=generator)[:size]].clone()
        for part, size in ((chunks[: count - tail], samples), (chunks[count - tail :], held_out))
    )
    source = f'"{dataset}"' if dataset_kind(dataset) == "name" else f"given {dataset_kind(dataset)}"
    description = (
        f"{source}: {train.shape[0]} training and {validation.shape[0]} validation sequences of {seq_len} tokens, "
        f"from {'all' if stream.complete else 'the first'} {stream.ids.numel()} tokens of {stream.documents} "
        f"document{'s' * (stream.documents != 1)}, {'BOS before each document' if stream.bos else 'no BOS added'}"
    )
    return CalibrationData(train, validation, sha256_of(train, validation), description)
