"""The model card of a checkpoint: metadata for the Hub's search, and a text that states only what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..log import get_logger
from .base import Base
from .card_text import card_text
from .facts import Export, Facts, read_exports, read_facts
from .names import check_hub_id
from .scores import same_metric
from .tags import merge_tags, tags_of

logger = get_logger(__name__)

# First line of the text of every card written here. Without it the text is somebody's own, and kept.
MARKER = "<!-- Written by optimum-mobilequant and replaced at the next push. To keep your edits, remove this line. -->"


def model_card(
    checkpoint: str | PathLike[str],
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    exports: Sequence[str | PathLike[str]] = (),
) -> ModelCard:
    """The card of a saved checkpoint, from its files alone; :func:`~optimum_mobilequant.hub.push.push` also asks the
    Hub for the base model's licence and size.

    Args:
        checkpoint: folder that ``quantize`` saved.
        repo_id: where it will be published, for title and code; None writes the folder's name.
        base_model: Hub id of the float model; None takes the recorded one.
        license: licence of the checkpoint, in the Hub's spelling, such as ``apache-2.0``.
        exports: folders of finished exports that are published with it.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a checkpoint of another method or a damaged one; an id or an export that is none.
    """
    folder = Path(checkpoint).expanduser()
    facts = read_facts(folder)
    found = read_exports(folder, [Path(path).expanduser() for path in exports])
    name = base_model or facts.base_model
    base = Base(check_hub_id(name, "base model")) if name else None
    return build_card(facts, repo_id or folder.resolve().name, base=base, license=license, exports=found)


def build_card(
    facts: Facts, repo_id: str, *, base: Base | None, license: str | None, exports: Sequence[Export]
) -> ModelCard:
    """The card from what is known.

    Args:
        base: the float model; None if unknown. license: wins over the base's.
    """
    results = _results(facts)
    data = ModelCardData(
        base_model=base.id if base else None,
        datasets=[facts.hub_dataset] if facts.hub_dataset else None,
        library_name="transformers",
        license=license or (base.license if base else None),
        license_name=base.license_name if base and not license else None,
        license_link=base.license_link if base and not license else None,
        pipeline_tag="text-generation",
        tags=tags_of(facts.config),
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    if base:
        data["base_model_relation"] = "quantized"
    if data.license is None:
        reason = f"{base.id} has no licence tag on the Hub" if base and base.described else "the licence is not known"
        logger.warning(f"{reason}, so the card names none: give --license (license=...)")
    text = card_text(facts, repo_id, base=base, license=data.license, exports=exports)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{MARKER}\n{text}")


def _results(facts: Facts) -> list[EvalResult]:
    results = [score.result() for evaluation in facts.evaluations for score in evaluation.scores]
    if "quantized" not in facts.perplexity:
        return results
    dataset = facts.hub_dataset
    validation = EvalResult(
        task_type="text-generation",
        dataset_type=dataset or "text",
        dataset_name=f"validation part of the calibration text{f' ({dataset})' if dataset else ''}",
        metric_type="perplexity",
        metric_name="perplexity",
        metric_value=float(f"{facts.perplexity['quantized']:.6g}"),
        metric_args={"seed": facts.config.seed},
        verified=False,
    )
    return [validation, *results]


def is_own(card: ModelCard) -> bool:
    """Whether the text was written here, or is the empty form that transformers uploads; neither is worth keeping."""
    return card.text.lstrip().startswith(MARKER) or card.text.strip() == _empty_form()


def _empty_form() -> str:
    # transformers.utils.hub.create_and_tag_model_card fills this one field. If another version's form differs, a card
    # is only kept where it could have been replaced.
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    return ModelCard.from_template(ModelCardData(), model_description=description).text.strip()


def merge(theirs: ModelCard, ours: ModelCard, *, explicit: Sequence[str] = ()) -> ModelCard:
    """Somebody's own card with what its metadata lack.

    Args:
        explicit: keys that were given for this push, and win over theirs.

    Returns:
        A card with their text, line for line.
    """
    merged = ModelCard(theirs.content)
    theirs_data, ours_data = cast(ModelCardData, merged.data), cast(ModelCardData, ours.data)
    for key, value in ours.data.__dict__.items():
        if value is None or key in ("tags", "eval_results", "model_name"):
            continue
        if key in explicit or theirs_data.get(key) is None:
            theirs_data[key] = value
    theirs_data.tags = merge_tags(theirs_data.tags or [], ours_data.tags or [])
    if results := ours_data.eval_results:
        kept = [r for r in theirs_data.eval_results or [] if not any(same_metric(r, o) for o in results)]
        theirs_data.eval_results = kept + results
        theirs_data.model_name = theirs_data.model_name or ours_data.model_name
    return merged
