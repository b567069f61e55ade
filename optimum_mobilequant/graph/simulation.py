"""The codes that the simulation computes: a quantized model's own forward pass, read at every quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..nn.quantizer import Quantizer, quantizers_of
from ..numerics.integer import to_grid
from ..runtime import simulated
from .executor import IntegerExecutor
from .inputs import DecoderInputs
from .ir import MOVES, Op


@torch.no_grad()
def simulated_codes(
    model: PreTrainedModel, executor: IntegerExecutor, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Codes of every tensor of the graph as the float32 simulation computes them.

    Tensors that the simulation does not hold (moved data, masked scores) are made from those that it does.

    Args:
        model: a quantized model in float32, on the CPU.
        executor: its executor, for the graph and for the operations that only move codes.
        input_ids: int64 ``[batch, sequence]``. attention_mask: 1 for a token, 0 for padding, or None.

    Returns:
        name -> codes in the shape and dtype of the graph, inputs included.
    """
    graph = executor.graph
    inputs = executor.inputs or DecoderInputs(model)
    step = inputs(input_ids, attention_mask)
    codes: dict[str, Tensor] = {
        "input_ids": input_ids, "attention_mask": step.visible, "position_cos": step.cos, "position_sin": step.sin,
    }  # fmt: skip
    for i, (keys, values) in enumerate(executor.start_cache(input_ids.shape[0])):
        codes |= {f"past_key_{i}": keys, f"past_value_{i}": values}

    producers = {op.output: op for op in graph.ops}

    def record(quantizer: Any, args: Any, output: Tensor) -> None:
        name = quantizer.spec.name
        if name in producers:  # not the rotary tables: they are inputs
            codes[name] = _codes(quantizer, output, producers[name])

    hooks = [quantizer.register_forward_hook(record) for quantizer in quantizers_of(model)]
    options: dict[str, Any] = {}
    if attention_mask is not None:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        options = {"attention_mask": attention_mask, "position_ids": positions}
    try:
        with simulated(model):
            model(input_ids=input_ids, use_cache=False, **options)
    finally:
        for hook in hooks:
            hook.remove()
    for op in graph.ops:
        if op.kind in MOVES or op.kind == "mask":
            codes[op.output] = executor.run_op(op, codes)
    if missing := [op.output for op in graph.ops if op.output not in codes]:
        raise RuntimeError(f"the model's forward pass did not reach these quantizers: {', '.join(missing)}")
    return codes


@dataclass(frozen=True)
class OperationDifference:
    """Codes of one operation's output, how many of them differ from the wanted ones, and by how much at most."""

    codes: int
    different: int
    largest: int


def operation_differences(executor: IntegerExecutor, codes: Mapping[str, Tensor]) -> dict[str, OperationDifference]:
    """Each operation on its own: fed with ``codes``, against the codes of its output there.

    Args:
        codes: what :func:`simulated_codes` returns.

    Returns:
        output name -> difference, in the order of the graph.
    """
    found = {}
    for op in executor.graph.ops:
        steps = (executor.run_op(op, codes).to(torch.int64) - codes[op.output].to(torch.int64)).abs()
        found[op.output] = OperationDifference(steps.numel(), int((steps > 0).sum()), int(steps.max()))
    return found


def _codes(quantizer: Quantizer, values: Tensor, producer: Op) -> Tensor:
    steps = torch.div(values.float(), quantizer.scale).round().to(torch.int32)
    if producer.kind in ("context", "norm") and steps.ndim == 4:
        steps = steps.transpose(1, 2)  # transformers splits the heads after the norm, and merges them before rounding
    return to_grid(steps, int(quantizer.zero_point), quantizer.spec.grid)
