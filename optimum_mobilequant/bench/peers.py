"""Other ways to run the model of a checkpoint. Adding one is adding a row to ``PEERS``."""

from __future__ import annotations

import importlib.util
import platform
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

    def float_model(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The plain transformers model with the checkpoint's rounded weights, with eager attention."""
        model = load(self.folder).dequantize().to(dtype)
        model.set_attn_implementation("eager")
        return model.eval()


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32: what peers compute in that leave the choice open."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = any(getattr(torch.cpu, name, bool)() for name in probes)
    return torch.bfloat16 if found or platform.machine().lower() in ("arm64", "aarch64") else torch.float32


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


def _float32(subject: Subject) -> Runner:
    return TransformersRunner(subject.float_model(torch.float32))


def _compiled(subject: Subject) -> Runner:
    runner = TransformersRunner(subject.float_model())
    runner.model = torch.compile(runner.model, dynamic=True)  # type: ignore[assignment]
    return runner


def _quanto(subject: Subject) -> Runner:
    from optimum.quanto import freeze, qint4, qint8, quantize

    model = subject.float_model(fast_dtype())
    quantize(model, weights=qint4 if subject.weight_bits == 4 else qint8)
    freeze(model)
    return TransformersRunner(model)


def _torchao(subject: Subject) -> Runner:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _by_torchao(subject, Int8DynamicActivationInt8WeightConfig(), fast_dtype())


def _torchao_int8(subject: Subject) -> Runner:
    from torchao.quantization import Int8WeightOnlyConfig

    return _by_torchao(subject, Int8WeightOnlyConfig(), fast_dtype())


def _torchao_int4(subject: Subject) -> Runner:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return _by_torchao(subject, PrototypeInt4WeightOnlyConfig(group_size=128), torch.bfloat16)


def _by_torchao(subject: Subject, config: Any, dtype: torch.dtype) -> Runner:
    from torchao.quantization import quantize_

    model = subject.float_model(dtype)
    quantize_(model, config)
    return TransformersRunner(model)


def _onnxruntime(subject: Subject) -> Runner:
    from ..exporters import export

    folder = subject.scratch / "onnx"
    export(subject.folder, "onnx", folder, context=subject.prompt + subject.tokens, prompt_length=subject.prompt)
    return OnnxRunner(folder, subject.threads)


def _onnxruntime_int4(subject: Subject) -> Runner:
    from .matmul_nbits import write_int4

    return OnnxRunner(write_int4(subject), subject.threads)


_FAST = "bfloat16 where the processor multiplies it, else float32"
PEERS: dict[str, Peer] = {
    "bf16": Peer("transformers, bfloat16, eager", "transformers", "transformers", _bfloat16),
    "fp32": Peer("transformers, float32, eager", "transformers", "transformers", _float32),
    "bf16-compile": Peer("bf16 through torch.compile", "torch", "torch", _compiled),
    "quanto": Peer(
        f"optimum-quanto, weights alone, the checkpoint's bits; {_FAST}", "optimum.quanto", "optimum-quanto", _quanto
    ),
    "torchao": Peer(f"torchao, int8 weights, dynamic int8 activations; {_FAST}", "torchao", "torchao", _torchao),
    "torchao-int8": Peer(f"torchao, int8 weights alone; {_FAST}", "torchao", "torchao", _torchao_int8),
    "torchao-int4": Peer(
        "torchao's prototype of int4 weights alone in groups of 128, bfloat16", "torchao", "torchao", _torchao_int4
    ),
    "onnxruntime": Peer(
        "the checkpoint exported to onnx, all graph optimizations", "onnxruntime", "onnxruntime onnx", _onnxruntime
    ),
    "onnxruntime-int4": Peer(
        "its float graphs with int4 weights in blocks of 32 (MatMulNBits), int8 products (accuracy level 4)",
        "onnxruntime",
        "onnxruntime onnx onnx-ir ml_dtypes",
        _onnxruntime_int4,
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
