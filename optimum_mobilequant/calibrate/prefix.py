"""Choose the tokens of the prefix, so that no token of a text is massive any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..log import get_logger
from ..plan import Plan
from .massive import Outliers, find_outliers

logger = get_logger(__name__)

# Tokens that a search may use, if the user names no number; large models need 1 to 4 (PrefixQuant, table 9).
MOST = 4
# Texts that are searched for outliers, and tokens of each on which a candidate is tried. Many short ones: what a
# candidate does depends most on how the text behind it begins.
TEXTS, TRIED = 64, 64
# Outlier tokens tried at each place of the prefix, beside the special tokens.
POOL = 5
# Nats by which a prefix may raise the float model's loss on those beginnings, if another one does not.
COST = 0.05
# Rotary embeddings whose table for a position does not depend on how long the text will be.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

Choice = bool | int | str | list[int]


@dataclass(frozen=True)
class FoundPrefix:
    """Tokens of the prefix, and what was seen: JSON numbers under ``outliers_per_text``, ``outlier_ratio`` and
    ``float_loss``, each without and with the prefix."""

    tokens: tuple[int, ...]
    report: dict[str, Any]


def most_tokens(choice: Choice) -> int:
    """Number of tokens that a prefix chosen in this way may have."""
    if isinstance(choice, list):
        return len(choice)
    if isinstance(choice, bool | str):
        return MOST if choice else 0
    return choice


def find_prefix(model: PreTrainedModel, plan: Plan, ids: Tensor, choice: Choice, *, batch_size: int) -> FoundPrefix:
    """The prefix that ``choice`` asks for.

    The search is greedy: of the tokens that are massive most often and the special ones, the next is the one that
    leaves the fewest massive tokens in the text behind it, and among equals the one with the smallest loss of the
    float model; those that raise this loss by more than :data:`COST` come last (tokens by frequency: PrefixQuant, Chen
    et al. 2024; greedy by loss: CushionCache, Son et al. 2024).

    Args:
        model: the float model.
        ids: calibration texts, int64 ``[texts, length]``.
        choice: as in the config: a list is taken as it is; ``"auto"`` looks for a prefix only if there are massive
            tokens, and takes it only if it removes at least half of them and costs the float model little.

    Raises:
        ValueError: a token outside the vocabulary, or rotary tables that change with the length of the text.
    """
    if not choice:
        return FoundPrefix((), {})
    rope = getattr(model.get_submodule(plan.family.rotary), "rope_type", "default")
    if rope not in _STATIC_ROPE:
        if choice == "auto":
            return FoundPrefix((), {})
        raise ValueError(f'a prefix cannot be kept under a rotary embedding of type "{rope}": use prefix=False')
    if isinstance(choice, list) and max(choice) >= plan.geometry.vocabulary:
        raise ValueError(f"prefix token {max(choice)} is outside the vocabulary of {plan.geometry.vocabulary}")
    ids = ids[:TEXTS]
    plain = find_outliers(model, plan, ids, batch_size=batch_size)
    if choice == "auto" and not plain.tokens:
        logger.info(f"no massive activations (largest token {plain.ratio:.0f} times the median): no prefix")
        return FoundPrefix((), _report(plain, plain))
    tokens = choice if isinstance(choice, list) else _search(model, plan, ids[:, :TRIED], plain, choice, batch_size)
    behind = find_outliers(model, plan, ids, prefix=tokens, batch_size=batch_size)
    if choice == "auto" and (behind.per_text > 0.5 * plain.per_text or behind.nll > plain.nll + COST):
        logger.warning(
            f"{plain.per_text:.2f} massive tokens in a text, but the best prefix {tokens} leaves {behind.per_text:.2f}"
            f" and moves the float model's loss from {plain.nll:.3f} to {behind.nll:.3f}: no prefix is used"
        )
        return FoundPrefix((), _report(plain, plain))
    logger.info(
        f"prefix {tokens}: massive tokens in a text {plain.per_text:.2f} -> {behind.per_text:.2f}, largest token "
        f"{plain.ratio:.0f} -> {behind.ratio:.0f} times the median"
    )
    return FoundPrefix(tuple(tokens), _report(plain, behind))


def _search(model: nn.Module, plan: Plan, ids: Tensor, plain: Outliers, choice: Choice, batch_size: int) -> list[int]:
    pool = _pool(model, plan, plain)
    prefix: list[int] = []
    best: Outliers | None = None
    most = find_outliers(model, plan, ids, batch_size=batch_size).nll + COST
    while len(prefix) < most_tokens(choice):
        tried = {t: find_outliers(model, plan, ids, prefix=[*prefix, t], batch_size=batch_size) for t in pool}
        token = min(pool, key=lambda t: (tried[t].nll > most, tried[t].per_text, tried[t].nll))
        if best is not None and tried[token].per_text >= best.per_text:
            break
        prefix, best = [*prefix, token], tried[token]
        if not best.tokens:
            break
    return prefix


def _pool(model: Any, plan: Plan, plain: Outliers) -> list[int]:
    special: list[Any] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.config.get_text_config(), name, None)
        special += value if isinstance(value, Sequence) else [value]
    usable = [t for t in special if t is not None and 0 <= t < plan.geometry.vocabulary]
    frequent = [token for token, _ in plain.tokens.most_common(POOL)]
    return list(dict.fromkeys([*usable, *frequent])) or [0]


def _report(plain: Outliers, behind: Outliers) -> dict[str, Any]:
    return {
        "outliers_per_text": [plain.per_text, behind.per_text],
        "outlier_ratio": [plain.ratio, behind.ratio],
        "float_loss": [plain.nll, behind.nll],
    }
