"""How a recipe, an effort and the user's own choices become one set of concrete settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..lookup import lookup
from .recipes import COMPENSATED, EFFORTS, MATRIX_SITES, RECIPES, SITES, Effort, Recipe


@dataclass(frozen=True)
class Settings:
    """Every number a run needs, none of them optional: recipe defaults <- effort <- the user's own values.

    Attributes are those of [`Recipe`] and [`Effort`]. When nothing is trained, ``steps`` is 0, ``tuning`` is
    ``"none"`` and every ``learn_*`` is False; ``objective`` then only names what is reported. Without scales among
    the transforms, and with adaptive smoothing, ``smooth_alpha`` is None. ``rounding_steps`` is above 0 exactly when
    ``rounding`` is ``"learned"``, ``finetune_steps`` exactly when ``finetune`` is not ``"none"``. ``finetune_ranges``:
    fine-tuning moves activation ranges, also in a recipe that learned none before; the user's ``learn_ranges=False``
    fixes them. ``finetune_samples``, of text of its own, is as many as its steps read, unless the user set it.
    """

    recipe: str
    effort: str
    seed: int
    samples: int
    seq_len: int
    batch_size: int
    steps: int
    rounding_steps: int
    eval_every: int
    transforms: tuple[str, ...]
    smoothing: str
    rotate: str | None
    smooth_alpha: float | None
    learn_transforms: bool
    learn_matrices: bool
    learn_clips: bool
    learn_ranges: bool
    range_init: str
    range_norm: float
    bias_correction: bool
    clip_init: str
    objective: str
    tuning: str
    rounding: str
    rounding_start: str
    hidden_weight: float
    magr: bool
    rounding_damping: float
    rounding_act_order: bool
    rounding_block: int
    lr_transforms: float
    lr_matrices: float
    lr_clips: float
    lr_ranges: float
    lr_offsets: float
    lr_gains: float
    top_k: int
    finetune: str
    finetune_steps: int
    finetune_samples: int
    feature_steps: int
    adapter_rank: int
    lr_adapters: float
    lr_finetune: float
    cross_entropy: float
    temperature: float
    attention_alignment: float
    attention_entropy: float
    token_share: float
    finetune_ranges: bool
    prefix: bool | int | str | list[int]
    key_shift: bool
    gradient_checkpointing: bool | None
    teacher_dtype: str


def _settle_rounding(effort: Effort, asked: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Learned rounding takes steps; without any it is rounding to nearest."""
    if values["rounding"] == "learned" and not values["rounding_steps"]:
        if asked.get("rounding") == "learned":
            given = "rounding_steps=0" if "rounding_steps" in asked else f'effort="{effort.name}"'
            raise ValueError(
                f'rounding="learned" would have no effect: {given} runs no step of it; set rounding_steps'
            )
        values["rounding"] = "nearest"
    if values["rounding"] != "learned":
        only: tuple[str, ...] = ("rounding_steps", "rounding_start", "lr_gains", "hidden_weight")
        only += () if values["finetune"] == "qad" else ("lr_offsets",)
        if ignored := [name for name in only if asked.get(name, 0) not in (0, "nearest")]:
            how = "to nearest" if values["rounding"] == "nearest" else f"by {values['rounding']}"
            raise ValueError(
                f"{ignored[0]}={asked[ignored[0]]} would have no effect: weights are rounded {how}; "
                'set rounding="learned"'
            )
        values.update(rounding_steps=0, rounding_start="nearest", hidden_weight=0.0)
    if values["rounding"] not in COMPENSATED and values["rounding_start"] not in COMPENSATED:
        if ignored := [name for name in _COMPENSATION if asked.get(name) not in (None, False)]:
            raise ValueError(
                f'{ignored[0]}={asked[ignored[0]]} would have no effect with rounding="{values["rounding"]}"; '
                'set rounding="gptq" or "qronos"'
            )
        values["magr"] = False


def _settle_hidden_weight(asked: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Hidden states beside the logits: not where they are the objective, nor where a rotation turns them."""
    reason = 'objective="hidden_mse" compares hidden states alone' if values["objective"] == "hidden_mse" else None
    if values["rotate"] in ("r1", "r1r2"):
        reason = f'rotate="{values["rotate"]}" turns the hidden states, so those of the float model are no target'
    if reason is not None:
        if asked.get("hidden_weight"):
            raise ValueError(f"hidden_weight={asked['hidden_weight']} would have no effect: {reason}")
        values["hidden_weight"] = 0.0


_COMPENSATION = ("magr", "rounding_damping", "rounding_act_order", "rounding_block")
_OF_FINETUNING = (
    "finetune_steps",
    "feature_steps",
    "finetune_samples",
    "lr_finetune",
    "cross_entropy",
    "temperature",
    "attention_alignment",
    "attention_entropy",
    "token_share",
)
_OF_WEIGHTS = ("adapter_rank", "lr_adapters")


def _settle_finetuning(effort: Effort, asked: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Fine-tuning takes steps on the logits; without any it is none."""
    if values["finetune"] != "none" and not values["finetune_steps"]:
        if asked.get("finetune", "none") != "none":
            given = "finetune_steps=0" if "finetune_steps" in asked else f'effort="{effort.name}"'
            raise ValueError(
                f'finetune="{values["finetune"]}" would have no effect: {given} runs no step of it; set finetune_steps'
            )
        values["finetune"] = "none"
    refused = {
        "none": ((*_OF_FINETUNING, *_OF_WEIGHTS), 'nothing is fine-tuned; set finetune="scales" or "qad"'),
        "scales": (_OF_WEIGHTS, 'finetune="scales" leaves the integers as they are; set finetune="qad"'),
        "qad": (("lr_adapters",), "every weight has an offset of its own; set adapter_rank=32"),
    }
    names, reason = refused[values["finetune"]]
    if values["finetune"] == "qad" and values["adapter_rank"]:
        names = () if values["rounding"] == "learned" else ("lr_offsets",)
        reason = "the offsets are products of two matrices; set adapter_rank=0"
    if ignored := [name for name in names if asked.get(name)]:
        raise ValueError(f"{ignored[0]}={asked[ignored[0]]} would have no effect: {reason}")
    if values["finetune"] == "none":
        values.update(finetune_steps=0, feature_steps=0)


_LEARNED = {
    "learn_transforms": "lr_transforms",
    "learn_matrices": "lr_matrices",
    "learn_clips": "lr_clips",
    "learn_ranges": "lr_ranges",
}


def _settle_transforms(recipe: Recipe, asked: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Nothing is learned, and nothing set, of scales and matrices that are not there."""
    values["transforms"] = tuple(values["transforms"])
    if not any(site in SITES for site in values["transforms"]):
        for name in ("smoothing", "smooth_alpha", "learn_transforms"):
            if asked.get(name) not in (None, False):
                raise ValueError(f'{name}={asked[name]} has no transform to act on; set transforms=["norm_qkv", ...]')
        values.update(smooth_alpha=None, learn_transforms=False)
    elif values["smoothing"] == "adaptive":
        if "smooth_alpha" in asked:
            raise ValueError(
                f'smooth_alpha={asked["smooth_alpha"]} would have no effect: smoothing is "adaptive"; '
                'set smoothing="balance"'
            )
        if "q_k" in values["transforms"]:
            raise ValueError(
                'smoothing="adaptive" has no rule for the site q_k; leave q_k out of transforms, '
                'or set smoothing="balance"'
            )
        values["smooth_alpha"] = None
    elif values["smooth_alpha"] is None and any(site in SITES for site in recipe.transforms):
        raise ValueError(f'smoothing="balance" needs a strength; recipe "{recipe.name}" has none; set smooth_alpha')
    elif values["smooth_alpha"] is None:
        raise ValueError(f'recipe "{recipe.name}" has no transforms by definition; use recipe="smoothquant" with them')
    rotate = values["rotate"]
    if not rotate and not any(site in MATRIX_SITES for site in values["transforms"]):
        if asked.get("learn_matrices"):
            raise ValueError('learn_matrices=True has no matrix to act on; set rotate="r2" or another rotation')
        values["learn_matrices"] = False
    if rotate in ("r2", "r1r2") and "v_o_dense" in values["transforms"]:
        raise ValueError(
            f'rotate="{rotate}" and transform "v_o_dense" are matrices at the same place, and any rotation is a dense '
            "matrix; leave out one"
        )
    if rotate in ("r1", "r1r2") and (
        values["objective"] == "hidden_mse" or values["tuning"] == "block-wise" or values["feature_steps"]
    ):
        raise ValueError(
            f'rotate="{rotate}" turns the residual stream, so hidden states of the float model are no target; use '
            'objective="logits_kl", tuning="end-to-end" and feature_steps=0, or rotate="r2"'
        )


def _why_untrained(recipe: Recipe, effort: Effort, values: Mapping[str, Any]) -> str | None:
    """The reason why these values train nothing, with the way out; None if they train something."""
    if recipe.tuning == "none":
        return f'recipe "{recipe.name}" trains nothing; use recipe="mobilequant" (or another recipe that learns)'
    if values["tuning"] == "none":
        return 'tuning="none" trains nothing; leave tuning unset'
    if effort.steps == 0:
        return f'effort="{effort.name}" runs no optimiser step; use effort="light" or more'
    if values["steps"] == 0:
        return "steps=0 runs no optimiser step; leave steps unset"
    if not any(values[name] for name in _LEARNED):
        return f"{', '.join(_LEARNED)} are all off, so nothing is trained; switch one on"
    return None


def settings_of(recipe_name: str, effort_name: str, choices: Mapping[str, Any], *, seed: int = 0) -> Settings:
    """Concrete settings: recipe defaults, then the effort, then the user's choices.

    Two values follow from others when left unset: block-wise tuning minimises ``hidden_mse`` (one layer has no
    logits), and choices that train nothing (a training-free recipe, ``effort="none"``, ``steps=0``) switch all
    learning off.

    Args:
        recipe_name: key of `RECIPES`.
        effort_name: key of `EFFORTS`.
        choices: values by the name of a [`Settings`] attribute; None counts as unset.
        seed: passed through.

    Raises:
        ValueError: unknown recipe or effort, or choices that contradict each other: asking for something that the
            other choices rule out is refused, never ignored.
    """
    recipe, effort = lookup("recipe", RECIPES, recipe_name), lookup("effort", EFFORTS, effort_name)
    asked = {name: value for name, value in choices.items() if value is not None}
    values: dict[str, Any] = {
        name: asked.get(name, getattr(effort if hasattr(effort, name) else recipe, name))
        for name in Settings.__dataclass_fields__
        if hasattr(recipe, name) or hasattr(effort, name)
    }
    if "range_norm" in asked and values["range_init"] != "lp":
        raise ValueError(f'range_norm={asked["range_norm"]} would have no effect: it belongs to range_init="lp"')
    _settle_finetuning(effort, asked, values)
    _settle_transforms(recipe, asked, values)
    _settle_rounding(effort, asked, values)
    reason = _why_untrained(recipe, effort, values)
    if reason is not None:
        needs_training: tuple[str, ...] = (*_LEARNED, *_LEARNED.values(), "steps")
        if values["rounding"] != "learned" and values["finetune"] == "none":
            needs_training += ("objective", "top_k", "gradient_checkpointing")
        ignored = [name for name in needs_training if asked.get(name)]
        ignored += ["tuning"] if asked.get("tuning", "none") != "none" else []
        if ignored:
            raise ValueError(f"{ignored[0]}={asked[ignored[0]]!r} would have no effect: {reason}")
        values.update(steps=0, tuning="none", **dict.fromkeys(_LEARNED, False))
    else:
        for learns, rate in _LEARNED.items():
            if rate in asked and not values[learns]:
                raise ValueError(f"{rate}={asked[rate]} would have no effect: {learns} is off; set {learns}=True")
        if values["tuning"] == "block-wise":
            if asked.get("objective") == "logits_kl":
                raise ValueError(
                    'objective="logits_kl" needs the logits, which one layer does not have; '
                    'use objective="hidden_mse" or tuning="end-to-end"'
                )
            values["objective"] = "hidden_mse"
        if "top_k" in asked and values["objective"] != "logits_kl":
            raise ValueError(f'top_k={asked["top_k"]} would have no effect: it belongs to objective="logits_kl"')
    _settle_hidden_weight(asked, values)
    trained = max(values[name] for name in ("steps", "rounding_steps", "finetune_steps", "feature_steps"))
    finetuning = values["finetune_steps"] + values["feature_steps"]
    values["eval_every"] = min(values["eval_every"] or trained, trained)

    return Settings(
        **{
            **values,
            "recipe": recipe.name,
            "effort": effort.name,
            "seed": seed,
            "finetune_ranges": values["finetune"] != "none" and asked.get("learn_ranges", True),
            "finetune_samples": asked.get("finetune_samples", values["batch_size"] * finetuning),
            "gradient_checkpointing": asked.get("gradient_checkpointing") if trained else False,
            "teacher_dtype": asked.get("teacher_dtype", "float32"),
        }
    )
