"""Block-wise tuning: each decoder layer against the float layer, in order (OmniQuant, Shao et al. 2024)."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.capture import layer_inputs, run_layer
from ..nn.prefix import prepend
from ..plan import Plan
from .loop import LearnResult, Loss, learn_end_to_end
from .objective import normalised_mse
from .parameters import Learnables


def _block_loss(layer: nn.Module, inputs: list[Tensor], options: list[dict[str, Any]], target: list[Tensor]) -> Loss:
    """Loss of a layer as a function of numbers of cached batches, which take the place of token ids."""

    def loss_of(batches: Tensor) -> Tensor:
        # The layer may round its input in place.
        losses = [normalised_mse(layer(inputs[j].clone(), **options[j]), target[j]) for j in batches.tolist()]
        return torch.stack(losses).mean()

    return loss_of


def learn_blockwise(
    learnables: Learnables,
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    loss_of: Loss,
    train: Tensor,
    validation: Tensor,
    *,
    steps: int,
    batch_size: int,
    rates: dict[str, float],
    seed: int,
) -> LearnResult:
    """Tune each layer for ``steps`` steps on MSE(float layer on float input, quantized layer on quantized input).

    Equal data to end-to-end tuning of the same ``steps``: every layer sees the same number of sequences.

    Args:
        loss_of: the whole model's objective, by which start and end are compared.
    """

    @torch.no_grad()
    def validate() -> float:
        losses = [loss_of(ids.to(device)) * len(ids) for ids in validation.split(batch_size)]
        return float(torch.stack(losses).sum() / len(validation))

    started = time.monotonic()
    device = next(student.buffers()).device
    skip = len(plan.prefix)  # the float layers read its tokens, the student has them in its cache
    batches = [ids.to(device) for ids in train.split(batch_size)]
    held_out = [ids.to(device) for ids in validation.split(batch_size)]
    layers = plan.geometry.layers
    path = plan.family.layer(0)
    learnables.release(student)
    start = validate()
    read = [prepend(ids, plan.prefix) for ids in batches + held_out]
    float_in, float_options = layer_inputs(teacher, teacher.get_submodule(path), read)
    quant_in, quant_options = layer_inputs(student, student.get_submodule(path), batches + held_out)
    for i in range(layers):
        teacher_layer, layer = (m.get_submodule(plan.family.layer(i)) for m in (teacher, student))
        target = run_layer(teacher_layer, float_in, float_options)
        learn_end_to_end(
            learnables,
            student,
            _block_loss(layer, quant_in, quant_options, [t[:, skip:] for t in target]),
            torch.arange(len(batches)),
            torch.arange(len(batches), len(batches) + len(held_out)),
            steps=steps,
            batch_size=1,
            eval_every=max(1, steps // 4),
            rates=rates,
            seed=seed + i,
            prefix=plan.family.layer(i) + ".",
            description=f"learn layer {i + 1}/{layers}",
        )
        learnables.bind(student)
        quant_in = run_layer(layer, quant_in, quant_options)
        float_in = target
    learnables.release(student)
    best = validate()
    return LearnResult(start, best, steps, time.monotonic() - started, [(0, start), (steps, best)])
