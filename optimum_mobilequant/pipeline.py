"""The method on one page: prefix, bits, calibrate, transform, learn, round, fine-tune, fold, pack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .allocate import allocate_bits
from .calibrate.stage import calibrate, choose_prefix
from .checkpoint import install
from .checkpoint.stage import fold_and_round
from .config import MobileQuantConfig
from .rounding import compensate_rounding
from .run.prepare import nll, prepare
from .transform.stage import rotate, transform
from .tune import build_student
from .tune.stage import correct_biases, finetune, learn, learn_rounding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        compensated = compensate_rounding(model, student, learnables, job)
        rounded = learn_rounding(model, student, learnables, job) or compensated
        correct_biases(model, student, job)
        finetuned = finetune(model, student, learnables, job)
        packed = fold_and_round(student, job)
        del student, learnables
        install(model, job.plan, packed)
        job.record(result, rounded, finetuned, nll(model, job.data.validation, job.settings.batch_size))
    attach(model, job.config)
    return model
