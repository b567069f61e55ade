"""Write safetensors files tensor by tensor, so that a model never has to fit in memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, the header as JSON,
then the tensors' bytes one after the other. Shapes are known before values, so the header can come first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..log import progress_bar

SHARD_BYTES = 5 * 10**9
_DTYPES = {
    torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor to be written.

    Args:
        name: its key.
        dtype, shape: of the whole.
        chunks: yields the values, cut along the first axis.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, entries: Sequence[Entry], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write ``model.safetensors``, or numbered shards with their index as transformers does.

    Args:
        entries: at least one; keys are unique.
        shard_bytes: a file that would grow beyond this is closed before.

    Returns:
        bytes of all tensors.

    Raises:
        RuntimeError: an entry yields values of another dtype or shape than it states.
    """
    shards = list(_shards(entries, shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    bar = progress_bar(None, "write", total=len(entries), unit="tensor")
    with bar:
        for name, shard in zip(names, shards, strict=True):
            _write(folder / name, shard, bar.update)
    total = sum(entry.bytes for entry in entries)
    if len(shards) > 1:
        place = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _shards(entries: Sequence[Entry], limit: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(e.bytes for e in shard) + entry.bytes > limit:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write(file: Path, entries: Sequence[Entry], done: Callable[[], object]) -> None:
    # Wide types first: every tensor then starts at a multiple of its own size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.bytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            rows = 0
            for chunk in entry.chunks():
                if chunk.dtype != entry.dtype or tuple(chunk.shape[1:]) != entry.shape[1:]:
                    raise RuntimeError(f"{entry.name} yields {chunk.dtype} {list(chunk.shape)}, not as announced")
                stream.write(chunk.contiguous().numpy().data)
                rows += chunk.shape[0]
            if rows != entry.shape[0]:
                raise RuntimeError(f"{entry.name} yields {rows} rows instead of {entry.shape[0]}")
            done()
