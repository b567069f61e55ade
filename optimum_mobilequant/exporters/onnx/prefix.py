"""The prefix of a checkpoint as exported graphs want it: what the first slots of the cache hold before any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ...graph import Graph
from ...numerics import dequantize
from .form import border_inputs
from .types import code_array

PREFIX = "prefix.safetensors"


def prefix_buffers(graph: Graph, *, floats: bool = False) -> dict[str, NDArray[Any]]:
    """Initial content of each cache input, in the layout of the fixed-size graphs.

    Args:
        floats: the values instead of the codes.

    Returns:
        ``past_key_<i>_in`` -> ``[kv_heads, 1, head_dim, length]`` and ``past_value_<i>_in`` -> ``[kv_heads, 1, length,
        head_dim]``: the first ``length`` places of the input; empty without a prefix.
    """
    names, buffers = border_inputs(graph), {}
    for name, codes in graph.prefix.items():
        encoding = graph.values[name].encoding
        assert encoding is not None
        if floats:
            held: NDArray[Any] = dequantize(codes, encoding.scale, encoding.zero_point).numpy()
        else:
            held = code_array(codes, encoding)[1]
        held = held[:, None]
        buffers[names[name]] = np.ascontiguousarray(held.swapaxes(2, 3) if "key" in name else held)
    return buffers


def write_prefix(graph: Graph, out: Path, *, floats: bool = False) -> dict[str, Any] | None:
    """``prefix.safetensors`` with :func:`prefix_buffers`.

    Returns:
        ``{"length", "file"}`` for a file that describes the export; None without a prefix, and no file.
    """
    if not graph.prefix:
        return None
    save_file(prefix_buffers(graph, floats=floats), out / PREFIX)
    return {"length": graph.prefix_length, "file": PREFIX}
