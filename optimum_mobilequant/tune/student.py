"""The student: the model with quantizers and tunable weights, sharing every tensor with the float teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Mode, set_mode, swap
from ..nn.formats import TunableFormat
from ..nn.prefix import TunablePrefix, logits_behind
from ..nn.tunable import TunableBias, TunableWeight
from ..plan import Plan

# Rescaling changes float32 rounding only; a wrong family entry changes the function.
_SAME = 1e-3


@torch.no_grad()
def refuse_different(student: nn.Module, model: nn.Module, ids: Tensor, prefix: Sequence[int] = ()) -> None:
    """Check that the student, transformed but not rounded, computes what the float model computes.

    Args:
        ids: int64 ``[sequences, length]``, on any device.
        prefix: tokens that the student has in its cache, and the float model reads.

    Raises:
        ValueError: the logits differ; the family's entry does not describe this architecture.
    """
    ids = ids.to(next(student.buffers()).device)
    set_mode(student, Mode.OFF)
    found: Tensor = student(input_ids=ids, use_cache=False).logits.float()
    expected = logits_behind(model, prefix, ids).float()
    set_mode(student, Mode.QUANTIZE)
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= _SAME:
        raise ValueError(
            f"before any rounding the swapped model already differs from the float model (relative error of the "
            f"logits {error:.2g}): the family's entry does not describe this architecture. Check norm_kind, "
            f"gain_offset and the module names in optimum_mobilequant/families/table.py, or leave out family=..."
        )


def build_student(
    model: nn.Module,
    plan: Plan,
    prefix: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    checkpointing: bool = False,
) -> nn.Module:
    """Copy the module tree of ``model`` without its tensors and swap the copy.

    The copy costs no memory for weights: tunable weights read the originals. The model itself is left as it is.

    Args:
        prefix: float keys and values of the plan's prefix tokens, layer by layer.
        checkpointing: recompute each decoder layer in the backward pass instead of keeping its activations and rounded
            weights.
    """
    # No parameter may collect gradients through the student: only what Learnables adds is trained.
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:
        shared[id(quantizer)] = quantizer
    student: nn.Module = copy.deepcopy(model, shared)
    f = plan.family
    states = {f.layer(i, f.attention): pair for i, pair in enumerate(prefix)}
    value_path, key_path = (name.removeprefix(f"{f.attention}.") for name in (f.value, f.key_norm or f.key))
    swap(
        student,
        plan,
        lambda path, weight: (TunableWeight if plan.weights[path].rule.format == "int" else TunableFormat)(
            weight.detach(),
            plan.weights[path],
            offset=plan.family.gain_offset if plan.weights[path].role == "gain" else 0.0,
        ),
        lambda path, bias: TunableBias(bias.detach()),
        lambda path: TunablePrefix(*states[path], value_path, key_path),
    )
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # gradient checkpointing needs train mode; the objective does not want noise
    student.eval()
    if checkpointing:
        old: Any = student.gradient_checkpointing_enable
        enable: Any = getattr(student, "activation_checkpointing_enable", old)  # renamed during transformers 5
        enable({"use_reentrant": False})
        student.train()  # transformers checkpoints in train mode only; dropout is off
    return student
