"""Other ways to run the model of a checkpoint. Adding one is adding a row to ``PEERS``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..lookup import lookup
from .runners import OnnxRunner, Runner, TransformersRunner


@dataclass(frozen=True)
class Subject:
    """What all contenders run.

    Attributes:
        folder: the quantized checkpoint. weight_bits: of its projections.
        scratch: folder for what a peer has to write. prompt, tokens: how many are read and written.
    """

    folder: Path
    weight_bits: int
    scratch: Path
    prompt: int
    tokens: int
    threads: int

    def float_model(self) -> Any:
        """The plain transformers model with the checkpoint's rounded weights, in bfloat16, with eager attention."""
        model = load(self.folder).dequantize().to(torch.bfloat16)
        model.set_attn_implementation("eager")
        return model.eval()


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Attributes:
        text: what it is. module, package: what it imports, and what pip installs for it.
        make: loads it.
    """

    text: str
    module: str
    package: str
    make: Callable[[Subject], Runner]


def load(folder: Path) -> Any:
    """The quantized model, with the backend that its config names."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _bfloat16(subject: Subject) -> Runner:
    return TransformersRunner(subject.float_model())


def _compiled(subject: Subject) -> Runner:
    runner = TransformersRunner(subject.float_model())
    runner.model = torch.compile(runner.model, dynamic=True)  # type: ignore[assignment]
    return runner


def _quanto(subject: Subject) -> Runner:
    from optimum.quanto import freeze, qint4, qint8, quantize

    model = subject.float_model()
    quantize(model, weights=qint4 if subject.weight_bits == 4 else qint8)
    freeze(model)
    return TransformersRunner(model)


def _torchao(subject: Subject) -> Runner:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = subject.float_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return TransformersRunner(model)


def _onnxruntime(subject: Subject) -> Runner:
    from ..exporters import export

    folder = subject.scratch / "onnx"
    export(subject.folder, "onnx", folder, context=subject.prompt + subject.tokens, prompt_length=subject.prompt)
    return OnnxRunner(folder, subject.threads)


PEERS: dict[str, Peer] = {
    "bf16": Peer("transformers, bfloat16, eager", "transformers", "transformers", _bfloat16),
    "bf16-compile": Peer("the same through torch.compile", "torch", "torch", _compiled),
    "quanto": Peer(
        "optimum-quanto, weights alone, the checkpoint's bits", "optimum.quanto", "optimum-quanto", _quanto
    ),
    "torchao": Peer("torchao, int8 weights, dynamic int8 activations", "torchao", "torchao", _torchao),
    "onnxruntime": Peer(
        "the checkpoint exported to onnx, all graph optimizations", "onnxruntime", "onnxruntime onnx", _onnxruntime
    ),
}


def check_installed(names: Sequence[str]) -> None:
    """Check the names of peers before any work.

    Raises:
        ValueError: an unknown name. ImportError: a package is missing; names the pip command.
    """
    peers = {name: lookup("peer", PEERS, name) for name in names}
    for name, peer in peers.items():
        if importlib.util.find_spec(peer.module) is None:
            raise ImportError(f'peer "{name}" needs {peer.module}, which is not installed: pip install {peer.package}')
