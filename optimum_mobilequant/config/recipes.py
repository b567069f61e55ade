"""The two tables behind ``recipe=`` and ``effort=``.

A recipe says *what* is done (which transforms, what is learned, against which objective), an effort says *how much*
(samples, steps). Anything a user sets in the config wins over both; see ``settings.settings_of``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

SITES = ("norm_qkv", "norm_mlp", "up_down", "v_o", "q_k")
MATRIX_SITES = ("v_o_dense", "q_k_rotation")
SIGN_SITES = ("signs",)
ROTATIONS = ("r1", "r2", "r1r2")
OBJECTIVES = ("logits_kl", "hidden_mse")
TUNINGS = ("end-to-end", "block-wise", "none")
SMOOTHINGS = ("balance", "adaptive")
RANGE_INITS = ("minmax", "percentile", "mse", "lp", "output")
CLIP_INITS = ("none", "mse", "adpq")
WEIGHT_FORMATS = ("int", "e0m4", "adpq")
ROUNDING_STARTS = ("nearest", "gptq", "qronos")
ROUNDINGS = ("nearest", "learned", "gptq", "qronos")
COMPENSATED = ("gptq", "qronos")  # roundings in closed form
SENSITIVITIES = ("jaccard", "kl", "hessian")
FINETUNES = ("none", "scales", "qad")
TEACHER_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """One quantization method, as data.

    Attributes:
        transforms: sites (of `SITES`, `MATRIX_SITES` and `SIGN_SITES`) where a scale, a matrix or signs move between
            producer and consumer; float outputs do not change.
        rotate: rotations merged into the weights: of the residual stream, of values, both (see `ROTATIONS`), or none.
        smoothing: where the scales start: SmoothQuant's balance of maxima, or QQQ's adaptive thresholds.
        smooth_alpha: migration strength in [0, 1] of the balance; None without it.
        learn_transforms, learn_matrices, learn_clips, learn_ranges: what training moves: transform scales, rotations
            and other matrices, weight clipping, activation ranges.
        range_init: how an activation range starts: from calibration statistics, or from the error of layer outputs.
        range_norm: exponent of the errors that ``range_init="lp"`` adds up.
        bias_correction: take the mean error of each output channel out of the bias, at the end.
        clip_init: how weight clipping starts: not at all, or at the clip of least squared weight error.
        objective: KL divergence of the logits, or mean squared error of hidden states.
        tuning: one optimisation of the whole model, one per decoder layer, or none.
        rounding: how weights reach the grid: to the nearest code, the way that training chose, or so that later
            columns make up for the error of earlier ones (``gptq``, ``qronos``).
        rounding_start: what learned rounding starts from.
        hidden_weight: of learned rounding with ``logits_kl``: weight of the relative squared error of what enters the
            head, beside the divergence.
        magr: reduce the largest weight of each row before ``gptq`` or ``qronos``.
        rounding_damping, rounding_act_order, rounding_block: of ``gptq`` and ``qronos``: share of the mean of the
            Hessian's diagonal added to it; whether columns with large inputs come first; columns at a time.
        lr_transforms, lr_clips, lr_ranges: AdamW learning rates; all three act on logarithms or logits.
        lr_matrices: of matrices, on angles.
        lr_offsets, lr_gains: of learned rounding, in steps of the grid and in logarithms of a row's scale; activation
            ranges move on at ``lr_ranges / 3``.
        top_k: teacher logits per token that enter ``logits_kl`` one by one; the rest is one bucket.
        finetune: what is trained behind the rounding: nothing, all but the integers, or these too (distillation).
        adapter_rank, lr_adapters: of the offsets of ``"qad"``, in steps of the grid: rank 0 gives each weight its own,
            which moves at ``lr_offsets``; a higher one makes them products of two thin matrices (LR-QAT).
        lr_finetune: of rows' scales and norm gains (logarithms) and of biases (255ths of the range of what they are
            added to) while fine-tuning; activation ranges move at ``lr_ranges``.
        cross_entropy, temperature, attention_alignment, attention_entropy, token_share: see ``tune.distill.Terms``.
        feature_steps: optimiser steps of ``"qad"`` on hidden states, before those on logits.
        prefix: tokens kept in the cache before every text: ``"auto"`` where the model has massive activations, or
            False for none.
        key_shift: a constant is taken off the rotated keys, which attention does not see.
        summary: one line for ``--help`` and the documentation.
    """

    name: str
    summary: str
    transforms: tuple[str, ...] = ()
    smoothing: str = "balance"
    rotate: str | None = None
    smooth_alpha: float | None = None
    learn_transforms: bool = False
    learn_matrices: bool = False
    learn_clips: bool = False
    learn_ranges: bool = False
    range_init: str = "minmax"
    range_norm: float = 2.4
    bias_correction: bool = False
    clip_init: str = "none"
    objective: str = "logits_kl"
    tuning: str = "none"
    rounding: str = "nearest"
    rounding_start: str = "nearest"
    hidden_weight: float = 1.0
    magr: bool = False
    rounding_damping: float = 0.01
    rounding_act_order: bool = True
    rounding_block: int = 128
    lr_transforms: float = 2e-2
    lr_matrices: float = 2e-3
    lr_clips: float = 5e-2
    lr_ranges: float = 1e-2
    lr_offsets: float = 1e-2
    lr_gains: float = 1e-3
    top_k: int = 1024
    finetune: str = "none"
    adapter_rank: int = 0
    lr_adapters: float = 5e-4
    lr_finetune: float = 1e-3
    cross_entropy: float = 0.0
    temperature: float = 1.0
    attention_alignment: float = 0.0
    attention_entropy: float = 0.0
    token_share: float = 1.0
    feature_steps: int = 0
    prefix: str | bool = False
    key_shift: bool = False


@dataclass(frozen=True)
class Effort:
    """How much data and how many optimiser steps a run spends.

    Attributes:
        recipe: what is done where the user names no recipe.
        samples: sequences drawn for calibration and training.
        seq_len: tokens per sequence (an upper limit: a model with fewer positions lowers it).
        batch_size: sequences per forward pass and per optimiser step.
        steps: optimiser steps (for each layer when tuning block-wise); 0 trains nothing.
        rounding_steps: optimiser steps of learned rounding.
        eval_every: steps between two measurements on the validation sequences; 0 without training.
        finetune_steps: optimiser steps of fine-tuning.
    """

    name: str
    summary: str
    recipe: str
    samples: int
    seq_len: int
    batch_size: int
    steps: int
    rounding_steps: int
    eval_every: int
    finetune_steps: int = 0


def _table(*rows: T) -> dict[str, T]:
    return {row.name: row for row in rows}  # type: ignore[attr-defined]


_MOBILEQUANT = Recipe(
    "mobilequant",
    "transforms, clipping and activation ranges learned together, end to end",
    transforms=("norm_qkv", "norm_mlp", "up_down", "v_o", "q_k"),
    smooth_alpha=0.7,
    learn_transforms=True,
    learn_matrices=True,
    learn_clips=True,
    learn_ranges=True,
    range_init="mse",
    clip_init="mse",
    objective="logits_kl",
    tuning="end-to-end",
)

RECIPES: dict[str, Recipe] = _table(
    Recipe("rtn", "round to nearest with static min/max ranges; the baseline every other recipe must beat"),
    Recipe(
        "smoothquant",
        "SmoothQuant at the two norm sites, nothing learned",
        transforms=("norm_qkv", "norm_mlp"),
        smooth_alpha=0.5,
    ),
    Recipe(
        "smoothquant-edge",
        "SmoothQuant extended to up/down and value/output, nothing learned",
        transforms=("norm_qkv", "norm_mlp", "up_down", "v_o"),
        smooth_alpha=0.5,
    ),
    Recipe(
        "omniquant-static",
        "transforms and clipping learned layer by layer, activation ranges fixed",
        transforms=("norm_qkv", "norm_mlp", "v_o", "q_k"),
        smooth_alpha=0.5,
        learn_transforms=True,
        learn_clips=True,
        objective="hidden_mse",
        tuning="block-wise",
    ),
    Recipe(
        "omniquant-edge",
        "omniquant-static plus the up/down transform",
        transforms=("norm_qkv", "norm_mlp", "up_down", "v_o", "q_k"),
        smooth_alpha=0.5,
        learn_transforms=True,
        learn_clips=True,
        objective="hidden_mse",
        tuning="block-wise",
    ),
    Recipe(
        "adpq",
        "no data for the weights: outliers found by the adaptive LASSO are clipped (AdpQ), static min/max ranges",
        clip_init="adpq",
    ),
    Recipe(
        "gptq",
        "the rounding error of each weight column spread over the others (GPTQ), static ranges searched",
        range_init="mse",
        clip_init="mse",
        rounding="gptq",
    ),
    Recipe(
        "qqq",
        "adaptive smoothing, then GPTQ (QQQ with static activations)",
        transforms=("norm_qkv", "norm_mlp", "up_down", "v_o"),
        smoothing="adaptive",
        range_init="mse",
        rounding="gptq",
    ),
    _MOBILEQUANT,
    replace(
        _MOBILEQUANT,
        name="best",
        summary="mobilequant with shifted keys and turned signs, then the rounding of every weight learned end to end",
        transforms=(*_MOBILEQUANT.transforms, *SIGN_SITES),
        rounding="learned",
        prefix="auto",
        key_shift=True,
    ),
    replace(
        _MOBILEQUANT,
        name="qad",
        summary="best, then quantization-aware distillation that moves every weight",
        transforms=(*_MOBILEQUANT.transforms, *SIGN_SITES),
        rounding="learned",
        prefix="auto",
        key_shift=True,
        finetune="qad",
    ),
)

EFFORTS: dict[str, Effort] = _table(
    Effort("none", "calibrate and transform, train nothing", "mobilequant", 64, 256, 8, 0, 0, 0),
    Effort("light", "a first look", "mobilequant", 128, 256, 8, 60, 60, 20, finetune_steps=60),
    Effort("default", "the usual trade", "best", 320, 256, 8, 200, 200, 25, finetune_steps=400),
    Effort(
        "best",
        "when the result matters more than the wait",
        "best",
        512,
        512,
        8,
        160,
        240,
        40,
        finetune_steps=400,
    ),
)
