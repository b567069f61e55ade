"""Run an exported folder in ONNX Runtime, as a phone would: prompt in chunks, then token by token, static cache.

Graph optimizations are off: they fold and fuse quantize-dequantize pairs, which changes results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from ...graph import Encoding
from ...numerics import Grid
from ..options import require
from .write import GRAPHS, PROMPT, TOKEN

Session = Any
_TYPES = {"float": np.float32, "uint8": np.uint8, "uint16": np.uint16, "int32": np.int32}


def cpu_session(path: Path) -> Session:
    """An ONNX Runtime session on the CPU without graph optimizations, on one thread.

    Raises:
        ImportError: onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """The prompt and the token graph of an export, with the cache they share.

    Args:
        folder: what the ``onnx`` target wrote.
        session: makes a session from the path of a graph; :func:`cpu_session`, or one of another provider.

    Raises:
        FileNotFoundError: no export in ``folder``.
        ImportError: onnxruntime is missing.
    """

    def __init__(self, folder: Path, *, session: Callable[[Path], Session] = cpu_session):
        if not (folder / GRAPHS).is_file():
            raise FileNotFoundError(f"no {GRAPHS} in {folder}: give a folder that export to onnx wrote")
        self.about = json.loads((folder / GRAPHS).read_text(encoding="utf-8"))
        self.context, self.chunk = int(self.about["context"]), int(self.about["prompt_length"])
        self.sessions = {n: session(folder / self.about["graphs"][n]["file"]) for n in (PROMPT, TOKEN)}
        self.rotary = load_file(folder / self.about["rotary"])
        stated = self.about.get("prefix")
        self.prefix = {} if stated is None else load_file(folder / stated["file"])
        self.prefix_length = 0 if stated is None else int(stated["length"])
        self.reset()

    @property
    def logits_encoding(self) -> Encoding | None:
        """Of the logits' codes; None if the graphs return floats."""
        port = self.about["graphs"][TOKEN]["outputs"]["logits"]
        if port["type"] == "float":
            return None
        scale, zero_point = torch.tensor(port["scale"]), torch.tensor(port["zero_point"], dtype=torch.int32)
        return Encoding(scale, zero_point, Grid(port["bits"], signed=False))

    def reset(self) -> None:
        """Forget all tokens; a prefix stays in the first slots of the cache."""
        self.filled = self.prefix_length
        self.cache = {}
        for name, port in self.about["graphs"][TOKEN]["inputs"].items():
            if name.startswith("past_"):
                zero = 0 if port["type"] == "float" else port["zero_point"]
                self.cache[name] = np.full(port["shape"], zero, _TYPES[port["type"]])
                if name in self.prefix:
                    part = (..., slice(self.filled)) if "key" in name else (..., slice(self.filled), slice(None))
                    self.cache[name][part] = self.prefix[name]

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.generic]:
        """Read new tokens and write their keys and values into the cache.

        Args:
            ids: ``[length]``, any length that still fits in the context.

        Returns:
            logits of each, codes or floats as the graphs return them, ``[length, vocabulary]``.

        Raises:
            ValueError: more tokens than the context holds, or an id outside the vocabulary.
        """
        if not len(ids) or self.filled + len(ids) > self.context:
            raise ValueError(
                f"{self.filled} + {len(ids)} tokens do not fit in the exported context of {self.context}: give at "
                "least one and at most that many, or export with a larger context"
            )
        if ids.min() < 0 or ids.max() >= self.about["facts"]["vocabulary"]:
            raise ValueError(f"token ids must lie in 0 to {self.about['facts']['vocabulary'] - 1}")
        parts = []
        while len(ids):
            # A prompt graph leaves C - S places for past tokens; beyond that, and for single tokens, the token graph.
            whole = len(ids) > 1 and self.filled <= self.context - self.chunk
            name, size = (PROMPT, self.chunk) if whole else (TOKEN, 1)
            parts.append(self._call(name, ids[:size], size))
            ids = ids[size:]
        return np.concatenate(parts)

    def _call(self, name: str, ids: NDArray[np.int64], size: int) -> NDArray[np.generic]:
        ports, past, count = self.about["graphs"][name]["inputs"], self.context - size, len(ids)
        padded = np.zeros((1, size), np.int32)
        padded[0, :count] = ids
        visible = np.zeros((size, self.context), bool)
        visible[:, : self.filled] = True
        visible[:, past:] = np.tril(np.ones((size, size), bool))  # padding follows the tokens, so no token sees it
        feeds: dict[str, NDArray[np.generic]] = {"input_ids": padded}
        feeds["attention_mask"] = self._mask(visible, ports["attention_mask"])[None, None]
        positions = np.minimum(self.filled + np.arange(size), self.context - 1)
        for part in ("cos", "sin"):
            feeds[f"position_ids_{part}"] = self._rotary(part, positions, ports[f"position_ids_{part}"])[None, None]
        for key, held in self.cache.items():
            feeds[key] = np.ascontiguousarray(held[..., :past] if "key" in key else held[:, :, :past])
        session = self.sessions[name]
        names = list(self.about["graphs"][name]["outputs"])
        found = dict(zip(names, session.run(names, feeds), strict=True))
        kept = min(count, self.context - 1 - self.filled)  # the last token of a full context is never looked back at
        for key, held in self.cache.items():
            new, start = found[key.replace("_in", "_out")], self.filled
            if "key" in key:
                held[..., start : start + kept] = new[..., :kept]
            else:
                held[:, :, start : start + kept] = new[:, :, :kept]
        self.filled += count
        logits: NDArray[np.generic] = found["logits"][0, :count]
        return logits

    def _mask(self, visible: NDArray[np.bool_], port: dict[str, Any]) -> NDArray[np.generic]:
        return np.where(visible, port["visible"], port["hidden"]).astype(_TYPES[port["type"]])

    def _rotary(self, part: str, positions: NDArray[np.int64], port: dict[str, Any]) -> NDArray[np.generic]:
        codes = self.rotary[part][positions]
        if port["type"] != "float" or "scale" not in port:
            return codes
        return (codes.astype(np.float32) - port["zero_point"]) * np.float32(port["scale"])


class LogitsRunner:
    """Whole sequences through an exported folder: what comparisons of runtimes call.

    Attributes:
        encoding: of the codes it returns; None if the graphs return floats.
    """

    def __init__(self, model: OnnxModel):
        self.model = model
        self.encoding = model.logits_encoding

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of token ids, int64 ``[batch, length]``; sequences run one by one.

        Returns:
            int32 codes (float32 where the graphs return floats), ``[batch, length, vocabulary]``.

        Raises:
            ValueError: longer than the exported context.
        """
        rows = []
        for row in ids.numpy():
            self.model.reset()
            rows.append(self.model.step(row))
        found = np.stack(rows)
        return torch.from_numpy(found if self.encoding is None else found.astype(np.int32))


def logits_runner(folder: Path, *, session: Callable[[Path], Session] = cpu_session) -> LogitsRunner:
    """A :class:`LogitsRunner` for a folder that the ``onnx`` target wrote; see :class:`OnnxModel`."""
    return LogitsRunner(OnnxModel(folder, session=session))
