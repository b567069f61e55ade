"""Stages 30 and 35 to 38: what is trained end to end against the float model, or other teachers.

Each function calls the training loop itself; the run's folder keeps a stage's result, and snapshots inside it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..log import get_logger
from .bias import bias_corrections, correct, correctable, withdraw
from .blockwise import learn_blockwise
from .distill import distillation_losses
from .finetune import Finetune
from .loop import LearnResult, Trainable, learn_end_to_end, mean_loss
from .objective import Objective, make_objective
from .parameters import Learnables
from .rounding import Rounding

if TYPE_CHECKING:
    from ..run.prepare import Prepared

logger = get_logger(__name__)


def learn(model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared) -> LearnResult:
    """Stage 30: tune what the recipe learns against the float model; the best validated parameters are kept."""
    s, data = job.settings, job.data
    objective = objective_of(job, s.steps)
    job.before(student)

    def loss_of(ids: Tensor) -> Tensor:
        return objective(student, model, ids)

    shared: dict[str, Any] = {"steps": s.steps, "batch_size": s.batch_size, "rates": job.rates, "seed": s.seed}
    if (result := kept(job, "learn", learnables)) is None and s.tuning == "block-wise":
        result = learn_blockwise(learnables, student, model, job.plan, loss_of, data.train, data.validation, **shared)
    elif result is None:
        result = learn_end_to_end(
            learnables, student, loss_of, data.train, data.validation, **shared, **resumable(job, "learn")
        )
    keep(job, "learn", learnables, student, result)
    if s.steps and result.best_step == 0:
        logger.warning(
            f"{s.steps} steps of learning found nothing better than the start, which is kept: lower the learning "
            "rates (lr_transforms, lr_clips, lr_ranges) or give more steps"
        )
    result.refuse_if_worse()
    return result


def learn_rounding(model: nn.Module, student: nn.Module, learnables: Learnables, job: Prepared) -> LearnResult | None:
    """Stage 35, learned: which way each weight is rounded. None where that is to nearest."""
    s, data = job.settings, job.data
    if not s.rounding_steps:
        return None
    rounding = Rounding(student, learnables)
    objective = objective_of(job, s.rounding_steps, hidden_weight=s.hidden_weight)
    if (result := kept(job, "round", rounding)) is None:
        result = learn_end_to_end(
            rounding,
            student,
            lambda ids: objective(student, model, ids),
            data.train,
            data.validation,
            steps=s.rounding_steps,
            batch_size=s.batch_size,
            rates=job.rounding_rates,
            seed=s.seed + 1,
            **resumable(job, "round"),
        )
    keep(job, "round", rounding, student, result)
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
    results: list[LearnResult] = []
    for number, (stage, steps) in enumerate(phases.items()):
        if not steps:
            continue
        if (result := kept(job, stage, tuned)) is None:
            result = learn_end_to_end(
                tuned,
                student,
                partial(losses[stage], student),
                job.finetune_ids,
                job.data.validation,
                steps=steps,
                batch_size=s.batch_size,
                rates=job.finetune_rates,
                seed=s.seed + 2 + number,
                warmup=steps // 10,
                **resumable(job, stage),
            )
        keep(job, stage, tuned, student, result)
        results.append(result)
    result = results[-1]
    result.start = start  # steps on hidden states may have cost more than those on logits brought back
    result.refuse_if_worse()
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


def objective_of(job: Prepared, steps: int, *, hidden_weight: float = 0.0) -> Objective:
    """What ``steps`` of tuning minimise, with the teacher's targets kept where they are used again."""
    s = job.settings
    shared: dict[str, Any] = {"rows": job.repeated(steps), "batch_size": s.batch_size, "hidden_weight": hidden_weight}
    return make_objective(s.objective, job.plan, top_k=s.top_k, teacher_dtype=s.teacher_dtype, **shared)


def kept(job: Prepared, stage: str, parameters: Trainable) -> LearnResult | None:
    """What the run's folder holds of a finished stage, loaded into ``parameters``; None if it holds nothing."""
    if (found := job.run.load(stage)) is None:
        return None
    parameters.load_state_dict(found[0])
    return LearnResult.from_dict(found[1])


def resumable(job: Prepared, stage: str) -> dict[str, Any]:
    """Arguments of the loop that let a stage go on from its last snapshot."""
    return {
        "eval_every": job.settings.eval_every,
        "resume": job.run.load_progress(stage),
        "snapshot": lambda tensors, meta: job.run.save_progress(stage, tensors, meta),
        "description": stage,
    }


def keep(job: Prepared, stage: str, parameters: Trainable, student: nn.Module, result: LearnResult) -> None:
    """Write a finished stage into the run's folder, and what it learned into the student."""
    job.run.save(stage, parameters.state_dict(), vars(result))
    parameters.release(student)
