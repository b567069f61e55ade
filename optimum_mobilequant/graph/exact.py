"""The simulation in float64: what the encodings say, without the rounding of float32.

A float32 sum or quotient now and then lands on the other side of a rounding boundary, which moves a code by one. This
is the reference that tells such a move from a fault of an integer implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..hf_quantizer import plan_of
from ..nn.quantizer import quantizers_of
from ..runtime import set_backend
from .executor import IntegerExecutor
from .inputs import DecoderInputs
from .operators import encoding_of
from .simulation import simulated_codes


class _Float64(TorchFunctionMode):
    """Makes the float32 islands of a model (norm statistics, softmax, dequantized weights) float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class ExactSimulation:
    """A quantized model computed in float64.

    Rotary tables and embedding table are constants of the graph, so they keep their codes; the grid of the
    probabilities is 1/qmax, not the float32 next to it.

    Args:
        model: a quantized model in float32, on the CPU; a copy is made. Texts without padding only.
        executor: its executor, with inputs.
    """

    def __init__(self, model: PreTrainedModel, executor: IntegerExecutor):
        if executor.inputs is None:
            raise ValueError("the executor must have been made with IntegerExecutor.of(model)")
        self.executor = executor
        self.model: Any = copy.deepcopy(model)
        set_backend(self.model, "simulate")
        self.model.double()
        family = plan_of(model, model.config.quantization_config).family
        for quantizer in quantizers_of(self.model):
            if quantizer.spec.role == "probabilities":
                quantizer.scale = torch.tensor(1.0 / quantizer.spec.grid.qmax, dtype=torch.float64)
        inputs: DecoderInputs = executor.inputs
        self._embedding = executor.graph.ops[0]
        encoding = encoding_of(executor.graph, self._embedding.output)

        def tables(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            length = output[0].shape[-2]
            halves = (inputs.cos[:length], inputs.sin[:length])
            return tuple((torch.cat([half, half], -1)[None].double() * 2.0**-14) for half in halves)

        def embedded(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            steps = self._embedded(args[0]).to(torch.int64) - encoding.zero_point
            return steps.double() * encoding.scale.double()

        self.model.get_submodule(family.rotary).register_forward_hook(tables)
        self.model.get_submodule(family.embedding).register_forward_hook(embedded)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """float64 ``[batch, sequence, vocabulary]``, on the logits' grid."""
        with _Float64():
            out: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return out

    def codes(self, input_ids: Tensor) -> dict[str, Tensor]:
        """As :func:`~.simulation.simulated_codes`."""
        with _Float64():
            found = simulated_codes(self.model, self.executor, input_ids)
        found[self._embedding.output] = self._embedded(input_ids)
        return found

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.executor.run_op(self._embedding, {"input_ids": ids})
