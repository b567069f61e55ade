"""The arithmetics in which a checkpoint can be run, as functions from token ids to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..graph.exact import ExactSimulation
from ..graph.executor import IntegerExecutor
from ..graph.inputs import DecoderInputs
from ..graph.ir import Encoding
from ..graph.load import LoadedGraph
from ..nn.prefix import logits_behind
from ..numerics.integer import to_grid


class LogitsRunner(Protocol):
    """Logits of token ids, int64 ``[batch, length]``, no padding: integer codes ``[batch, length, vocabulary]`` on
    ``encoding``, or float32 if that is None."""

    @property
    def encoding(self) -> Encoding | None: ...

    def __call__(self, ids: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Request:
    """What the runners are made from; fields with the name of a runner say whether it is wanted."""

    loaded: LoadedGraph
    float32: bool
    onnx: Path | None
    onnx_float64: bool
    htp: bool
    float_model: str | None
    seq_len: int


@dataclass(frozen=True)
class Runner:
    """A function and the encoding of the codes that it returns (None: it returns floats)."""

    run: Callable[[Tensor], Tensor]
    encoding: Encoding | None = None

    def __call__(self, ids: Tensor, /) -> Tensor:
        return self.run(ids)


def _logits_encoding(loaded: LoadedGraph) -> Encoding:
    encoding = loaded.graph.values[loaded.graph.outputs[0]].encoding
    assert encoding is not None
    return encoding


def _float(request: Request) -> LogitsRunner | None:
    return None if request.float_model is None else _float_behind(request, ())


def _float_prefix(request: Request) -> LogitsRunner | None:
    prefix = request.loaded.plan.prefix
    return _float_behind(request, prefix) if request.float_model is not None and prefix else None


def _float_behind(request: Request, prefix: tuple[int, ...]) -> LogitsRunner:
    assert request.float_model is not None
    model = AutoModelForCausalLM.from_pretrained(request.float_model, dtype=torch.float32).eval()
    vocabulary = request.loaded.graph.facts["vocabulary"]
    if (found := model.config.get_text_config().vocab_size) != vocabulary:
        raise ValueError(
            f"{request.float_model!r} has {found} tokens and the checkpoint {vocabulary}: give the float model that "
            "the checkpoint was made from"
        )

    @torch.no_grad()
    def run(ids: Tensor) -> Tensor:
        return logits_behind(model, prefix, ids)

    return Runner(run)


def _simulate(request: Request) -> LogitsRunner | None:
    # in float64: one wrong code of float32's rounding is passed on by every layer behind it
    simulation = ExactSimulation(request.loaded.model, _executor(request))
    return _rounded(simulation.logits, request)


def _float32(request: Request) -> LogitsRunner | None:
    if not request.float32:
        return None
    return _rounded(lambda ids: _forward(request.loaded.model, ids), request)


def _rounded(logits: Callable[[Tensor], Tensor], request: Request) -> LogitsRunner:
    """A simulation's logits, which lie on their grid already, as codes."""
    encoding = _logits_encoding(request.loaded)

    def run(ids: Tensor) -> Tensor:
        steps = torch.div(logits(ids), encoding.scale).round().to(torch.int32)
        return to_grid(steps, int(encoding.zero_point), encoding.grid)

    return Runner(run, encoding)


def _integer(request: Request) -> LogitsRunner | None:
    executor = _executor(request)
    return Runner(lambda ids: executor.forward(ids).logits, _logits_encoding(request.loaded))


def _executor(request: Request) -> IntegerExecutor:
    return IntegerExecutor(request.loaded.graph, DecoderInputs(request.loaded.model, request.seq_len))


def _onnx(request: Request) -> LogitsRunner | None:
    from ..exporters.onnx.runtime import cpu_session

    return None if request.onnx is None else _exported(request, request.onnx, cpu_session)


def _onnx_float64(request: Request) -> LogitsRunner | None:
    from ..exporters.onnx.float64 import float64_session

    if not request.onnx_float64 or request.onnx is None:
        return None
    return _exported(request, request.onnx, float64_session)


def _exported(request: Request, folder: Path, session: Callable[[Path], Any]) -> LogitsRunner:
    from ..exporters.onnx.runtime import logits_runner

    runner = logits_runner(folder, session=session)
    prefix = request.loaded.graph.prefix_length
    needed, behind = request.seq_len + prefix, f" behind a prefix of {prefix}" if prefix else ""
    if runner.model.prefix_length != prefix:
        raise ValueError(f"{folder} was exported from another checkpoint: its prefix has another length")
    if (context := runner.model.context) < needed:
        raise ValueError(
            f"{folder} was exported for {context} tokens, windows have {request.seq_len}{behind}: lower seq_len, or "
            f"export with --context {needed}"
        )
    if runner.encoding is not None and not runner.encoding.same_as(_logits_encoding(request.loaded)):
        raise ValueError(f"{folder} was exported from another checkpoint: its logits have another scale")
    return runner


def _htp(request: Request) -> LogitsRunner | None:
    if not request.htp:
        return None
    from ..exporters.htp import HtpRunner

    chunk = min(32, max(1, request.seq_len // 2))
    context = request.seq_len + request.loaded.graph.prefix_length
    return HtpRunner(request.loaded.folder, context=context, prompt_length=chunk)


# A runner is compared with each that stands before it.
RUNNERS: dict[str, Callable[[Request], LogitsRunner | None]] = {
    "float": _float,
    "float_prefix": _float_prefix,
    "simulate": _simulate,
    "float32": _float32,
    "integer": _integer,
    "onnx": _onnx,
    "onnx_float64": _onnx_float64,
    "htp": _htp,
}


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
