"""Ranges of least error where it counts: at the output of the decoder layer, one activation after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..log import progress_bar
from ..nn import Mode, Quantizer, quantizers_of, set_mode
from ..nn.capture import layer_inputs, run_layer
from ..numerics import affine_qparams
from ..plan import Plan
from .objective import normalised_mse

# Times the range that the search over the values themselves found.
_FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
# Sequences: PrefixQuant (Chen et al. 2024) finds ranges of least block error on as many.
SEQUENCES = 8

Ranges = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def least_output_error(student: nn.Module, plan: Plan, ranges: Ranges, ids: Tensor, batch_size: int) -> Ranges:
    """Search every 8-bit activation's range, in the order of the data flow, for the least squared error of the output
    of its decoder layer.

    The float layer runs on float input, the rounded one on what the layers before it, already searched, give it.
    Activations outside the layers, 16-bit ones and scores keep their range.

    Args:
        student: with quantizers set to ``ranges`` and weights that round as they will; its quantizers are set to the
            result.
        ids: int64 ``[sequences, length]``; the first SEQUENCES are used.

    Returns:
        quantizer name -> (low, high), as :func:`~..calibrate.choose_ranges`.
    """
    device = next(student.buffers()).device
    batches = [batch.to(device) for batch in ids[:SEQUENCES].split(batch_size)]
    first = student.get_submodule(plan.family.layer(0))
    found = dict(ranges)
    set_mode(student, Mode.OFF)
    float_in, options = layer_inputs(student, first, batches)
    set_mode(student, Mode.QUANTIZE)
    quant_in, _ = layer_inputs(student, first, batches)
    layers = range(plan.geometry.layers)
    for i in progress_bar(layers, "search ranges", unit="layer"):
        layer = student.get_submodule(plan.family.layer(i))
        set_mode(layer, Mode.OFF)
        target = run_layer(layer, float_in, options)
        set_mode(layer, Mode.QUANTIZE)

        def error(layer: nn.Module = layer, inputs: list[Tensor] = quant_in, goal: list[Tensor] = target) -> float:
            outputs = run_layer(layer, inputs, options)
            return sum(float(normalised_mse(out, t)) for out, t in zip(outputs, goal, strict=True))

        best = error()
        for quantizer in _searched(layer, plan):
            name = quantizer.spec.name
            low, high = ranges[name]
            for factor in _FACTORS:
                quantizer.set(*affine_qparams(low * factor, high * factor, quantizer.spec.grid))
                if (now := error()) < best:
                    best, found[name] = now, (low * factor, high * factor)
            quantizer.set(*affine_qparams(*found[name], quantizer.spec.grid))
        quant_in, float_in = run_layer(layer, quant_in, options), target
    return found


def _searched(layer: nn.Module, plan: Plan) -> Iterator[Quantizer]:
    """8-bit quantizers of a layer in the order of the data flow."""
    inside = {q.spec.name: q for q in quantizers_of(layer)}
    for name, spec in plan.activations.items():
        if name in inside and spec.bits <= 8 and spec.fixed is None and spec.role != "scores":
            yield inside[name]
