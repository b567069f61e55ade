"""The two things that are timed, reading a prompt and writing tokens, for every kind of model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..families import cache_name


class Runner(Protocol):
    """A loaded model.

    Attributes:
        weight_bytes: what its weights take in memory, scales and other constants included.
    """

    weight_bytes: int

    def read(self, ids: Tensor) -> int:
        """Forget everything, read a prompt (int64 ``[length]``) and return the next token, the likeliest."""
        ...

    def write(self, token: int) -> int:
        """Read one more token and return the next."""
        ...


class TransformersRunner:
    """A transformers model with a key-value cache; logits of the last position alone, as ``generate`` asks for."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.weight_bytes = resident_bytes(model)
        self._cache: Any = None

    @torch.no_grad()
    def read(self, ids: Tensor) -> int:
        self._cache = None
        return self._step(ids[None])

    @torch.no_grad()
    def write(self, token: int) -> int:
        return self._step(torch.tensor([[token]]))

    def _step(self, ids: Tensor) -> int:
        name = cache_name(self.model)
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: self._cache})
        self._cache = getattr(out, name)
        return int(out.logits[0, -1].argmax())


class OnnxRunner:
    """An export to ``onnx`` in ONNX Runtime with all graph optimizations; its prompt graph computes all logits."""

    def __init__(self, folder: Path, threads: int):
        from ..exporters.onnx.runtime import OnnxModel

        def session(path: Path) -> Any:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        self._model = OnnxModel(folder, session=session)
        self.weight_bytes = sum(path.stat().st_size for path in folder.glob("*.data"))

    def read(self, ids: Tensor) -> int:
        self._model.reset()
        return int(self._model.step(ids.numpy())[-1].argmax())

    def write(self, token: int) -> int:
        return int(self._model.step(torch.tensor([token]).numpy())[-1].argmax())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the memory behind all parameters and buffers, each counted once, also inside tensor subclasses."""
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for plain in _plain(tensor.data):
            if plain.is_mkldnn:  # oneDNN's own layout: no storage to ask, and padding unknown
                storages[id(tensor)] = plain.numel() * plain.element_size()
                continue
            storage = plain.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensors that a subclass (of quanto, of torchao) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
