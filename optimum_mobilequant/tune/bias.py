"""Bias correction: take the mean error that rounding leaves in each output channel out of the bias.

Nagel et al. 2019 ("Data-free quantization through weight equalization and bias correction", section 4.2), the
empirical form: ``b -= E[y_rounded] - E[y_float]``, on calibration text, with rounded weights and activations, one
projection after the other. A bias is part of the int32 accumulator: it costs 4 bytes a channel and no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from ..log import get_logger, progress_bar
from ..nn import Mode, set_mode
from ..nn.capture import layer_inputs, run_layer
from ..nn.tunable import TunableBias
from ..plan import Plan

logger = get_logger(__name__)

PARTS = ("query", "key", "value", "out", "gate", "up", "down")
# Projections whose inputs do not depend on each other are measured together.
_STEPS = (("query", "key", "value"), ("out",), ("gate", "up"), ("down",))


def correctable(model: nn.Module, family: Family) -> tuple[str, ...]:
    """The projections (of PARTS) that have a bias, or can have one by a flag of the model's config.

    Raises:
        ValueError: there is none.
    """
    flagged = {part for parts in family.bias_flags.values() for part in parts}
    found = tuple(part for part in PARTS if part in flagged or _bias(model, family, part) is not None)
    if not found:
        raise ValueError(
            f"bias_correction=True has nothing to act on: no projection of {family.name} has a bias, and its "
            "architecture knows no flag that adds one; leave it out"
        )
    if left := [part for part in PARTS if part not in found]:
        logger.info(f"bias correction leaves out {', '.join(left)}: {family.name} has no biases there")
    return found


def _bias(model: nn.Module, family: Family, part: str) -> Any:
    return getattr(model.get_submodule(family.layer(0, getattr(family, part))), "bias", None)


@torch.no_grad()
def bias_corrections(
    student: nn.Module, plan: Plan, parts: Sequence[str], ids: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """Mean error of each output channel of the projections ``parts``, in the order of the data flow.

    Corrections made so far act while the next ones are measured; afterwards they are all in place.

    Args:
        ids: int64 ``[sequences, length]``.

    Returns:
        module path -> float32 ``[out]``, what has been added to its bias.
    """
    f, device = plan.family, next(student.buffers()).device
    batches = [batch.to(device) for batch in ids.split(batch_size)]
    first = student.get_submodule(f.layer(0))
    set_mode(student, Mode.OFF)
    float_in, options = layer_inputs(student, first, batches)
    set_mode(student, Mode.QUANTIZE)
    quant_in, _ = layer_inputs(student, first, batches)
    corrections: dict[str, Tensor] = {}
    layers = range(plan.geometry.layers)
    for i in progress_bar(layers, "correct biases", unit="layer"):
        layer = student.get_submodule(f.layer(i))
        paths = {part: f.layer(i, getattr(f, part)) for part in parts}
        set_mode(layer, Mode.OFF)
        with _means(student, list(paths.values())) as expected:
            float_in = run_layer(layer, float_in, options)
        set_mode(layer, Mode.QUANTIZE)
        for step in _STEPS:
            wanted = [paths[part] for part in step if part in paths]
            if not wanted:
                continue
            with _means(student, wanted) as found:
                run_layer(layer, quant_in, options)
            for path in wanted:
                corrections[path] = (expected(path) - found(path)).float()
                correct(student, {path: corrections[path]})
        quant_in = run_layer(layer, quant_in, options)
    return corrections


@contextmanager
def _means(student: nn.Module, paths: Sequence[str]) -> Iterator[Callable[[str], Tensor]]:
    """While open, average what each linear computes before its output is rounded."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(path: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            sums[path] = sums.get(path, 0.0) + rows.double().sum(0)
            counts[path] = counts.get(path, 0) + len(rows)

        return add

    hooks = []
    for path in paths:
        linear: Any = student.get_submodule(path)
        hooks.append(linear.output.register_forward_pre_hook(watch(path)))
    try:
        yield lambda path: sums[path] / counts[path]
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def correct(student: nn.Module, corrections: Mapping[str, Tensor]) -> None:
    """Add corrections to the biases of a student; a projection without one gets one."""
    for path, change in corrections.items():
        linear: Any = student.get_submodule(path)
        if linear.bias is None:
            linear.bias = TunableBias(torch.zeros_like(change), added=True)
        before = linear.bias.correction
        linear.bias.correction = change if before is None else before + change


def withdraw(student: nn.Module, corrections: Mapping[str, Tensor]) -> None:
    """Undo :func:`correct`; a bias that it added is gone again."""
    for path in corrections:
        linear: Any = student.get_submodule(path)
        linear.bias.correction = None
        if linear.bias.added:
            linear.bias = None
