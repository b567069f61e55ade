"""Inputs of a real model for the run on a device, and its outputs against the integer executor's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ...graph.executor import IntegerExecutor
from ...graph.inputs import DecoderInputs
from ..onnx.prefix import prefix_buffers
from ..source import Source, open_checkpoint
from .folders import GraphFolder, scratch
from .samples import sample_inputs

# Of the tokens of the sample.
_SEED = 0


class Reference:
    """A checkpoint as the judge of what a device computes. The model is loaded when it is first needed.

    Args:
        checkpoint: folder of a saved model.
        out: where ``inputs_<graph>.safetensors`` are kept, so that a later call sends and compares the same.
    """

    def __init__(self, checkpoint: Path, out: Path) -> None:
        self._checkpoint, self._out = checkpoint, out

    @cached_property
    def _source(self) -> Source:
        return open_checkpoint(self._checkpoint)

    @cached_property
    def _executor(self) -> IntegerExecutor:
        return IntegerExecutor(self._source.graph, DecoderInputs(self._source.model))

    def samples(self, graphs: Sequence[GraphFolder]) -> dict[str, dict[str, NDArray[np.generic]]]:
        """Graph -> input -> codes: random tokens with the model's own rotary tables, and nothing but a prefix in
        the cache."""
        made = {}
        for graph in graphs:
            path = self._out / f"inputs_{graph.name}.safetensors"
            if not path.is_file():
                with scratch(self._out) as folder:
                    save_file(self._sample(graph), folder / path.name)
                    os.replace(folder / path.name, path)
            stored = load_file(path)
            # The file has its own order, but that of a data set is part of its schema.
            made[graph.name] = {tensor.name: stored[tensor.name] for tensor in graph.inputs}
        return made

    def _sample(self, graph: GraphFolder) -> dict[str, NDArray[np.generic]]:
        count = next(tensor.shape[-1] for tensor in graph.inputs if tensor.name == "input_ids")
        ids = np.random.default_rng(_SEED).integers(int(self._source.graph.facts["vocabulary"]), size=count)
        graph_of = self._source.graph
        start = graph_of.prefix_length
        tables = (table[start:].numpy().astype(np.float64) for table in self._source.rotary_tables(start + count))
        cos, sin = tables
        return sample_inputs(graph, ids.tolist(), rotary=(cos, sin), prefix=prefix_buffers(graph_of))

    def compare(self, graph: GraphFolder, inputs: Mapping[str, NDArray[np.generic]], outputs: Path) -> dict[str, Any]:
        """Logits from the device against the executor's on the same tokens.

        Args:
            inputs: what the device was given.
            outputs: safetensors file of what it returned.

        Returns:
            ``sqnr_db`` of the real values (null if they are equal), ``same_choice``, the share of tokens after which
            both hold the same next one likeliest, and ``largest_difference`` in steps of the logits. ``compared`` is
            false, and there is nothing else, if the device returned no logits of the expected shape.
        """
        logits = next((tensor for tensor in graph.outputs if tensor.name == "logits"), None)
        found = load_file(outputs).get("logits")
        if logits is None or logits.scale is None or found is None or found.shape != logits.shape:
            return {"compared": False}
        ids = torch.from_numpy(inputs["input_ids"].astype(np.int64))
        encoding = self._executor.graph.values[self._executor.graph.outputs[0]].encoding
        assert encoding is not None
        codes = self._executor.forward(ids).logits.numpy().astype(np.float64)
        expected = (codes - float(encoding.zero_point)) * float(encoding.scale)
        real = found.astype(np.float64)
        if np.issubdtype(found.dtype, np.integer):
            real = (real - (logits.zero_point or 0)) * logits.scale
        noise = float(np.square(real - expected).sum())
        return {
            "compared": True,
            "sqnr_db": 10 * math.log10(float(np.square(expected).sum()) / noise) if noise else None,
            "same_choice": float((real.argmax(-1) == expected.argmax(-1)).mean()),
            "largest_difference": float(np.abs(real - expected).max() / logits.scale),
        }
