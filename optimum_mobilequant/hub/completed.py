"""The card of ``model.push_to_hub()``: transformers writes an empty form, which is filled in before the upload."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, ModelCardData

from .base import look_up
from .card import build_card, is_own, merge
from .errors import TRANSPORT_ERRORS
from .facts import TOKENIZER_FILES, read_exports, read_facts
from .push import CARD
from .tags import merge_tags

# What an earlier push was told and a later one may not know.
_GIVEN = ("base_model", "base_model_relation", "license", "license_name", "license_link")


def complete_card(folder: str | PathLike[str], repo_id: str, *, token: str | bool | None = None) -> None:
    """Write the card of a checkpoint into its ``README.md``.

    The empty form and a card of an earlier push are replaced, with their tags, base model and licence kept; a card
    that somebody wrote keeps its text, and its metadata are completed.

    Args:
        folder: with all files that are about to be uploaded, and the card that transformers made.
        repo_id: where they go. token: for the licence of the base model and for what lies there already.
    """
    folder = Path(folder)
    facts, api = read_facts(folder), HfApi(token=token)
    if not facts.has_tokenizer:  # a push of the model leaves the tokenizer to a push of its own
        facts = replace(facts, has_tokenizer=_has_tokenizer(api, repo_id))
    theirs = ModelCard.load(folder / CARD)
    known = cast(ModelCardData, theirs.data)
    name = facts.base_model or (known.base_model if isinstance(known.base_model, str) else None)
    base = look_up(name, api) if name else None
    license = known.license if is_own(theirs) else None
    card = build_card(facts, repo_id, base=base, license=license, exports=read_exports(folder, ()))
    if not is_own(theirs):
        merge(theirs, card).save(folder / CARD)
        return
    data = cast(ModelCardData, card.data)
    for key in _GIVEN:
        if data.get(key) is None and known.get(key) is not None:
            data[key] = known[key]
    data.tags = merge_tags(known.tags or (), data.tags or ())
    card.save(folder / CARD)


def _has_tokenizer(api: HfApi, repo_id: str) -> bool:
    try:
        files = {file.rfilename for file in api.model_info(repo_id).siblings or ()}
    except TRANSPORT_ERRORS:
        return False
    return bool(files & set(TOKENIZER_FILES))
