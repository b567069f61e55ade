"""The prefix of a checkpoint as the saved state of a Genie dialog.

Genie's configuration has no place for the first contents of a cache, but ``GenieDialog_restore`` reads a folder that
``GenieDialog_save`` wrote. Its layout was read off folders that libGenie 1.21 wrote on the HTP emulator, and this
module writes such a folder for a dialog that has read nothing but the prefix:

    dialog.json                  counts; -1 as last token, so that nothing is put before the first query
    kv-slot-0.primary.qnn-htp    16 bytes: tensors (uint32), 0xC0DE (uint32), 2 bytes of 0, heads, head_dim and
                                 tokens (uint16 each); keys of all layers [heads, head_dim, tokens], then values
                                 [heads, tokens, head_dim], as codes; a scale for each of these tensors (float64)
    token-history-slot-0         the tokens (uint32)
    unprocessed-data             empty
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..graph import Graph
from .genie_runner import STATE
from .onnx.prefix import prefix_buffers

_MAGIC = 0xC0DE


def write_state(graph: Graph, tokens: Sequence[int], out: Path) -> None:
    """Write the folder ``prefix`` into a bundle; nothing for a graph without a prefix.

    Args:
        tokens: ids of the prefix.
    """
    if not graph.prefix:
        return
    (folder := out / STATE).mkdir()
    count, buffers = len(tokens), prefix_buffers(graph)
    # All keys, then all values: [heads, 1, ...] in the layout of the graphs' inputs.
    order = sorted(buffers, key=lambda name: ("value" in name, int(name.split("_")[2])))
    scales = [float(graph.values[name.removesuffix("_in")].encoding.scale) for name in order]  # type: ignore[union-attr]
    header = (len(order), _MAGIC, 0, 0, graph.facts["kv_heads"], graph.facts["head_dim"], count)
    with (folder / "kv-slot-0.primary.qnn-htp").open("wb") as file:
        file.write(struct.pack("<IIBBHHH", *header))
        for name in order:
            file.write(buffers[name].astype(np.uint8, casting="equiv").tobytes())
        file.write(struct.pack(f"<{len(scales)}d", *scales))
    (folder / "token-history-slot-0").write_bytes(struct.pack(f"<{count}I", *tokens))
    (folder / "unprocessed-data").write_bytes(b"")
    counts = {"n-past": count, "n-prompt": count, "last-tok": -1, "prefill-only": False}
    zeros = ("n-generated", "n-queries", "process-state", "unprocessed-embedding-size", "unprocessed-tokens-size")
    (folder / "dialog.json").write_text(json.dumps(counts | dict.fromkeys(zeros, 0)), encoding="utf-8")
