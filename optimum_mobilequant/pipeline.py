"""The method on one page: prefix, bits, calibrate, transform, learn, round, fine-tune, fold, pack."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .allocate import allocate_bits
from .calibrate import FoundPrefix, Statistics, choose_ranges, collect, find_prefix
from .checkpoint import Packed, install, pack
from .config import MobileQuantConfig
from .log import get_logger
from .nn.matrix import Matrix
from .nn.prefix import prefix_states
from .prepare import Prepared, nll, prepare
from .recipes import COMPENSATED, SITES
from .rounding import compensate_rounding
from .transform import Edge, adaptive_scales, edges_of, matrix_edges_of, smooth_scales
from .tune import (
    Finetune,
    Learnables,
    LearnResult,
    Rounding,
    attach_matrices,
    bias_corrections,
    build_student,
    correct,
    correctable,
    learn_blockwise,
    learn_end_to_end,
    least_output_error,
    refuse_different,
    withdraw,
)
from .tune.distill import distillation_losses
from .tune.loop import Loss, Trainable, mean_loss
from .tune.objective import Objective, make_objective
from .tune.output_ranges import Ranges

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)

# Share of the median channel's magnitude below which a channel counts as silent.
SILENT = 0.01


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: MobileQuantConfig | None = None,
    *,
    run_dir: str | None = None,
) -> PreTrainedModel:
    """Quantize a float causal LM with MobileQuant (Tan et al., EMNLP 2024).

    Args:
        model: a transformers causal LM of a known family, on one device. It is changed in place at the very end, after
            everything that can fail; until then it is the teacher and stays as it is.
        tokenizer: for text datasets; None takes ``config.tokenizer``, then the one saved beside the model.
        config: preset, data and recipe; see :class:`MobileQuantConfig`. It is copied, not changed.
        run_dir: folder for the stages' results; wins over ``config.run_dir``. A run that is interrupted resumes there,
            with the result of an uninterrupted one bit for bit.

    Returns:
        ``model``, now float32 with integer weights and static activation encodings, ready for ``save_pretrained``.

    Raises:
        ValueError: unsuitable model, data or config, before any long work.
        FloatingPointError: tuning diverged. RuntimeError: the result is worse than its start.
    """
    from .hf_quantizer import attach

    with prepare(model, tokenizer, config or MobileQuantConfig(), run_dir) as job:
        states = choose_prefix(model, job)
        allocate_bits(job)
        student = build_student(model, job.plan, states, checkpointing=bool(job.settings.gradient_checkpointing))
        matrices = rotate(student, job)
        statistics = calibrate(student, job)
        learnables = transform(model, student, statistics, job, matrices)
        result = learn(model, student, learnables, job)
        rounded = round_weights(model, student, learnables, job)
        correct_biases(model, student, job)
        finetuned = finetune(model, student, learnables, job)
        packed = fold_and_round(student, job)
        del student, learnables
        install(model, job.plan, packed)
        job.record(result, rounded, finetuned, nll(model, job.data.validation, job.settings.batch_size))
    attach(model, job.config)
    return model


def choose_prefix(model: PreTrainedModel, job: Prepared) -> list[tuple[Tensor, Tensor]]:
    """Stage 4: the tokens that every text finds in its cache; their float keys and values, layer by layer."""
    if job.settings.prefix is False:
        return []
    if (kept := job.run.load("prefix")) is not None:
        found = FoundPrefix(tuple(kept[0]["tokens"].tolist()), kept[1])
    else:
        found = find_prefix(model, job.plan, job.data.train, job.settings.prefix, batch_size=job.settings.batch_size)
        job.run.save("prefix", {"tokens": torch.tensor(found.tokens, dtype=torch.int64)}, found.report)
    job.use_prefix(found)
    return prefix_states(model, found.tokens) if found.tokens else []


def rotate(student: nn.Module, job: Prepared) -> dict[str, Matrix]:
    """Before all else: the bases in which activations are looked at."""
    s = job.settings
    return attach_matrices(
        student, matrix_edges_of(job.plan.family, job.plan.geometry, s.transforms, s.rotate, seed=s.seed)
    )


def calibrate(student: nn.Module, job: Prepared) -> Statistics:
    """Stage 10: what every activation of the float model looks like."""
    if (kept := job.run.load("calibrate")) is not None:
        return Statistics.from_tensors(kept[0])
    statistics = collect(student, job.data.train, batch_size=job.settings.batch_size)
    job.run.save("calibrate", statistics.to_tensors(), {})
    return statistics


def transform(
    model: nn.Module,
    student: nn.Module,
    statistics: Statistics,
    job: Prepared,
    matrices: Mapping[str, Matrix] | None = None,
) -> Learnables:
    """Stage 20: start values of the transforms, of the activation ranges behind them, and of the clipping."""
    s = job.settings
    edges = edges_of(job.plan.family, job.plan.geometry, [site for site in s.transforms if site in SITES])
    scales = start_scales(edges, model, student, statistics, job, turned=bool(matrices))
    learnables = Learnables(student, job.plan, edges, scales, matrices)
    refuse_different(student, model, job.data.validation[:1], job.plan.prefix)
    if (kept := job.run.load("transform")) is not None:
        statistics = Statistics.from_tensors(kept[0])
    elif edges:
        statistics = collect(student, job.data.train, batch_size=s.batch_size, description="calibrate again")
        job.run.save("transform", statistics.to_tensors(), {})
    by_value = "mse" if s.range_init == "output" else s.range_init
    ranges = choose_ranges(job.plan, statistics, by_value, norm=s.range_norm)
    learn_ranges = s.learn_ranges or s.finetune_ranges
    learnables.set_ranges(student, ranges, learn=learn_ranges)
    if s.learn_clips or s.clip_init != "none":
        learnables.add_clips(s.clip_init)
    learnables.release(student)
    if s.range_init == "output":
        learnables.set_ranges(student, search_ranges(student, ranges, job), learn=learn_ranges)
        learnables.release(student)
    return learnables


def start_scales(
    edges: list[Edge], model: nn.Module, student: nn.Module, statistics: Statistics, job: Prepared, *, turned: bool
) -> dict[str, Tensor]:
    """Stage 15, where it takes long: log-scales that the transforms start from, in the bases that matrices made."""

    def weight_of(path: str) -> Tensor:
        module: Any = student.get_submodule(path)
        return module.weight.folded()

    alpha = job.settings.smooth_alpha or 0.0
    if job.settings.smoothing != "adaptive":
        # Behind a prefix the units that made its tokens massive fire no more.
        silent = SILENT if job.plan.prefix else 0.0
        of = weight_of if turned else None
        return smooth_scales(edges, model, statistics.channel_absmax, alpha, weight_of=of, silent=silent)
    if (kept := job.run.load("smooth")) is not None:
        return kept[0]
    scales = adaptive_scales(edges, student, job.plan, job.data.train, batch_size=job.settings.batch_size)
    job.run.save("smooth", scales, {})
    return scales


def search_ranges(student: nn.Module, ranges: Ranges, job: Prepared) -> Ranges:
    """Stage 25: with ``range_init="output"``, start ranges by the error of each layer's output."""
    if (kept := job.run.load("ranges")) is not None:
        return {name: (ends[0], ends[1]) for name, ends in kept[0].items()}
    found = least_output_error(student, job.plan, ranges, job.data.train, job.settings.batch_size)
    job.run.save("ranges", {name: torch.stack(ends) for name, ends in found.items()}, {})
    return found


def learn(model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared) -> LearnResult:
    """Stage 30: tune what the recipe learns against the float model; the best validated parameters are kept."""
    s, data = job.settings, job.data
    objective = objective_of(job, s.steps)
    job.before(student)

    def loss_of(ids: Tensor) -> Tensor:
        return objective(student, model, ids)

    shared: dict[str, Any] = {"batch_size": s.batch_size, "rates": job.rates, "seed": s.seed}
    if (kept := job.run.load("learn")) is not None:
        learnables.load_state_dict(kept[0])
        result = LearnResult.from_dict(kept[1])
    elif s.tuning == "block-wise":
        result = learn_blockwise(
            learnables, student, model, job.plan, loss_of, data.train, data.validation, steps=s.steps, **shared
        )
    else:
        result = learn_end_to_end(
            learnables,
            student,
            loss_of,
            data.train,
            data.validation,
            steps=s.steps,
            eval_every=s.eval_every,
            resume=job.run.load_progress("learn"),
            snapshot=lambda tensors, meta: job.run.save_progress("learn", tensors, meta),
            **shared,
        )
    job.run.save("learn", learnables.state_dict(), vars(result))
    if s.steps and result.best_step == 0:
        logger.warning(
            f"{s.steps} steps of learning found nothing better than the start, which is kept: lower the learning "
            "rates (lr_transforms, lr_clips, lr_ranges) or give more steps"
        )
    learnables.release(student)
    result.refuse_if_worse()
    return result


def objective_of(job: Prepared, steps: int) -> Objective:
    """What ``steps`` of tuning minimise, with the teacher's targets kept where they are used again."""
    s = job.settings
    shared: dict[str, Any] = {"rows": job.repeated(steps), "batch_size": s.batch_size}
    return make_objective(s.objective, job.plan, top_k=s.top_k, teacher_dtype=s.teacher_dtype, **shared)


def round_weights(model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared) -> LearnResult | None:
    """Stage 35: with the transforms fixed, choose the code of each weight. None where it is the nearest."""
    s, found = job.settings, None
    if s.rounding in COMPENSATED or s.rounding_start in COMPENSATED:
        found = compensate_rounding(model, student, learnables, job)
    return learn_rounding(model, student, learnables, job) or found


def learn_rounding(model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared) -> LearnResult | None:
    """Stage 35, learned: which way each weight is rounded. None where that is to nearest."""
    s = job.settings
    if not s.rounding_steps:
        return None
    rounding = Rounding(student, learnables)
    objective = objective_of(job, s.rounding_steps)
    result = train_stage(
        "round",
        rounding,
        student,
        lambda ids: objective(student, model, ids),
        job.data.train,
        job,
        steps=s.rounding_steps,
        rates=job.rounding_rates,
        seed=s.seed + 1,
    )
    result.refuse_if_worse()
    return result


def finetune(model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared) -> LearnResult | None:
    """Stages 37 and 38: distil from the teachers, on hidden states and then on logits. None where that is off."""
    s = job.settings
    if s.finetune == "none":
        return None
    tuned = Finetune(student, learnables, rank=s.adapter_rank if s.finetune == "qad" else None, seed=s.seed)
    losses = distillation_losses(model, job.plan, s, [(t.module(model), t.weight) for t in job.teachers])
    phases = {"features": s.feature_steps, "finetune": s.finetune_steps}
    start = mean_loss(tuned, student, partial(losses["finetune"], student), job.data.validation, s.batch_size)
    for number, (stage, steps) in enumerate(phases.items()):
        if not steps:
            continue
        result = train_stage(
            stage,
            tuned,
            student,
            partial(losses[stage], student),
            job.finetune_ids,
            job,
            steps=steps,
            rates=job.finetune_rates,
            seed=s.seed + 2 + number,
            warmup=steps // 10,
        )
    result.start = start  # steps on hidden states may have cost more than those on logits brought back
    result.refuse_if_worse()
    return result


def train_stage(
    stage: str,
    parameters: Trainable,
    student: nn.Module,
    loss_of: Loss,
    ids: Tensor,
    job: Prepared,
    *,
    steps: int,
    rates: dict[str, float],
    seed: int,
    warmup: int = 0,
) -> LearnResult:
    """Train ``parameters`` end to end on ``ids``, or take what the run's folder holds of that stage."""
    if (kept := job.run.load(stage)) is not None:
        parameters.load_state_dict(kept[0])
        result = LearnResult.from_dict(kept[1])
    else:
        result = learn_end_to_end(
            parameters,
            student,
            loss_of,
            ids,
            job.data.validation,
            steps=steps,
            batch_size=job.settings.batch_size,
            eval_every=job.settings.eval_every,
            rates=rates,
            seed=seed,
            resume=job.run.load_progress(stage),
            snapshot=lambda tensors, meta: job.run.save_progress(stage, tensors, meta),
            description=stage,
            warmup=warmup,
        )
    job.run.save(stage, parameters.state_dict(), vars(result))
    parameters.release(student)
    return result


def correct_biases(model: nn.Module, student: nn.Module, job: Prepared) -> None:
    """Stage 38: with ``bias_correction``, take mean errors out of the biases; kept if the objective falls."""
    s, data = job.settings, job.data
    if not s.bias_correction:
        return
    objective = make_objective(s.objective, job.plan, top_k=s.top_k, teacher_dtype=s.teacher_dtype)

    def loss() -> float:
        batches = data.validation.to(next(student.buffers()).device).split(s.batch_size)
        return sum(float(objective(student, model, ids)) * len(ids) for ids in batches) / len(data.validation)

    if (kept := job.run.load("bias")) is not None:
        corrections, result = kept
        correct(student, corrections)
    else:
        start = loss()
        parts = correctable(model, job.plan.family)
        corrections = bias_corrections(student, job.plan, parts, data.train, s.batch_size)
        end = loss()
        result = {"start": start, "corrected": end, "kept": end < start}
        job.run.save("bias", corrections, result)
    if not result["kept"]:
        logger.warning(
            f"bias correction is left out: it would raise the objective from {result['start']:.5g} to "
            f"{result['corrected']:.5g}"
        )
        withdraw(student, corrections)
    job.recorded["bias_correction"] = result


def fold_and_round(student: nn.Module, job: Prepared) -> Packed:
    """Stage 40: integers."""
    if (kept := job.run.load("pack")) is not None:
        return Packed.from_tensors(kept[0])
    packed = pack(student, job.plan)
    job.run.save("pack", packed.to_tensors(), {})
    return packed
