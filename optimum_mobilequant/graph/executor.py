"""The integer executor: runs the graph on integer codes, from token ids to the logits' codes.

What it returns is what a device computes that follows the arithmetic of :mod:`~optimum_mobilequant.numerics.integer`;
integer sums have no order, so prefill, chunked prefill and decoding agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..hf_quantizer import plan_of
from ..numerics import dequantize
from .build import build_graph
from .inputs import DecoderInputs
from .ir import Graph, Op
from .operators import encoding_of, prepare

KVCache = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepOutput:
    """Codes that a run returns.

    Attributes:
        logits: ``[batch, sequence, vocabulary]``, on the grid of the graph's first output.
        past: keys and values of each layer, ``[batch, kv_heads, length, head_dim]``: the new ones from
            :meth:`IntegerExecutor.run`, all of them from :meth:`IntegerExecutor.forward`.
    """

    logits: Tensor
    past: list[tuple[Tensor, Tensor]]


class IntegerExecutor:
    """Executes an integer graph on the CPU.

    Args:
        graph: what :func:`~.build.build_graph` returns. Multipliers and tables of all operations are prepared here.
        inputs: makes the rotary tables and masks for :meth:`forward`; None if only :meth:`run` is used.

    Raises:
        ValueError: a tensor without an encoding, or a shape that the integer arithmetic does not hold.
    """

    def __init__(self, graph: Graph, inputs: DecoderInputs | None = None):
        self.graph = graph
        self.inputs = inputs
        self.functions = {op.output: prepare(graph, op) for op in graph.ops}
        kept = set(graph.outputs)
        seen: set[str] = set()
        self._drop: dict[str, tuple[str, ...]] = {}  # operation -> tensors that no later one reads
        for op in reversed(graph.ops):
            last = {name for name in op.inputs if name not in seen | kept | graph.constants.keys()}
            self._drop[op.output] = tuple(last)
            seen |= last

    @classmethod
    def of(cls, model: PreTrainedModel, *, positions: int | None = None) -> IntegerExecutor:
        """Executor of a quantized model, as ``from_pretrained`` or ``quantize`` returns it.

        Args:
            positions: length of the rotary tables; None for all that the model has.
        """
        plan = plan_of(model, model.config.quantization_config)
        return cls(build_graph(model, plan), DecoderInputs(model, positions))

    def run(
        self,
        input_ids: Tensor,
        *,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor,
        past: KVCache | None = None,
        trace: dict[str, Tensor] | None = None,
    ) -> StepOutput:
        """Run the graph on its own inputs.

        Args:
            input_ids: int64 ``[batch, sequence]``.
            cos, sin: int16 ``[batch, 1, sequence, rotary_dims / 2]``, see :func:`~.inputs.rotary_tables`.
            visible: bool or integer ``[batch, 1, sequence, total]``; 0 hides a position.
            past: codes of the cached keys and values of each layer; None for :meth:`start_cache`.
            trace: filled with the codes of every tensor that an operation makes, by name.

        Raises:
            ValueError: ids outside the vocabulary, inputs of a wrong dtype, a cache for another number of layers.
        """
        layers = self.graph.facts["layers"]
        _check_ids(input_ids, self.graph.facts["vocabulary"])
        for name, given in (("cos", cos), ("sin", sin), ("visible", visible)):
            if given.is_floating_point():
                raise ValueError(f"{name} must hold integers, not {given.dtype}")
        if past is None:
            past = self.start_cache(input_ids.shape[0])
        if len(past) != layers:
            raise ValueError(f"the cache holds {len(past)} layers, but the model has {layers}")
        values = {"input_ids": input_ids, "attention_mask": visible, "position_cos": cos, "position_sin": sin}
        for i, (keys, held) in enumerate(past):
            values |= {f"past_key_{i}": keys, f"past_value_{i}": held}
        for op in self.graph.ops:
            values[op.output] = self._call(op, values)
            if trace is not None:
                trace[op.output] = values[op.output]
            for name in self._drop[op.output]:
                del values[name]
        logits, *new = (values[name] for name in self.graph.outputs)
        return StepOutput(logits, list(zip(new[::2], new[1::2], strict=True)))

    def run_op(self, op: Op, inputs: Mapping[str, Tensor]) -> Tensor:
        """Codes of one operation's output from the codes of its inputs, by name (constants need not be given)."""
        return self._call(op, inputs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past: KVCache | None = None,
        *,
        trace: dict[str, Tensor] | None = None,
    ) -> StepOutput:
        """Run on token ids; ``past`` of the result holds the whole cache, a prefix first, for the next call.

        Args:
            input_ids: int64 ``[batch, sequence]``.
            attention_mask: 1 for a token, 0 for padding on either side, ``[batch, cached + sequence]`` (a prefix
                not counted); None for no padding.

        Raises:
            ValueError: as :meth:`run`, a mask of another shape, or a text longer than the rotary tables.
        """
        if self.inputs is None:
            raise ValueError("forward needs rotary tables and masks: make the executor with IntegerExecutor.of(model)")
        _check_ids(input_ids, self.graph.facts["vocabulary"])
        if past is None:
            past = self.start_cache(input_ids.shape[0])
        length = past[0][0].shape[2] - self.graph.prefix_length
        step = self.inputs(input_ids, attention_mask, length)
        out = self.run(input_ids, cos=step.cos, sin=step.sin, visible=step.visible, past=past, trace=trace)
        joined = [
            (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
            for (k, v), (new_k, new_v) in zip(past, out.past, strict=True)
        ]
        return StepOutput(out.logits, joined)

    def generate(self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
        """Greedy continuation through the cache: int64 ``[batch, sequence + max_new_tokens]``. Pad on the left."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, out = input_ids, self.forward(input_ids, mask)
        for step in range(max_new_tokens):
            token = out.logits[:, -1:].argmax(-1)  # one scale for all logits: the order of codes is theirs
            ids = torch.cat([ids, token], dim=1)
            if step + 1 < max_new_tokens:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                out = self.forward(token, mask, out.past)
        return ids

    def start_cache(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Codes of the keys and values before any text: those of the prefix, of length 0 without one."""
        return [
            (self._start(f"past_key_{i}", batch), self._start(f"past_value_{i}", batch))
            for i in range(self.graph.facts["layers"])
        ]

    def dequantize(self, name: str, codes: Tensor) -> Tensor:
        """float32 values of a tensor's codes; ``graph.outputs[0]`` is the logits' name."""
        encoding = encoding_of(self.graph, name)
        return dequantize(codes, encoding.scale, encoding.zero_point)

    def _call(self, op: Op, values: Mapping[str, Tensor]) -> Tensor:
        return self.functions[op.output](*(values[name] for name in op.inputs if name not in self.graph.constants))

    def _start(self, name: str, batch: int) -> Tensor:
        if name in self.graph.prefix:
            return self.graph.prefix[name].expand(batch, -1, -1, -1)
        size = self.graph.size(name, batch=batch, past=0)
        return torch.zeros(size, dtype=encoding_of(self.graph, name).grid.dtype)


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(f"token ids must be whole numbers [batch, sequence], got {ids.dtype} {list(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())}, but the vocabulary has {vocabulary} entries"
        )
