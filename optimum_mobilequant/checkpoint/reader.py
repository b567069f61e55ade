"""Tensors of a saved folder by their keys, read one at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_INDEX = "model.safetensors.index.json"


class TensorReader:
    """The safetensors files of a folder. Only headers are read at first; :meth:`read` brings one tensor in.

    Args:
        folder: holds ``model.safetensors``, or shards with their index.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: an index or a shard is damaged.
    """

    def __init__(self, folder: Path):
        self.files = _files(folder)
        self._place: dict[str, Any] = {}
        for file in self.files:
            try:
                shard = safe_open(file, framework="pt")
                self._place |= dict.fromkeys(shard.keys(), shard)
            except (SafetensorError, OSError, struct.error) as error:
                raise ValueError(
                    f"{file} is damaged or truncated ({error}); download or save the checkpoint again"
                ) from error

    @property
    def keys(self) -> set[str]:
        return set(self._place)

    def read(self, key: str) -> Tensor:
        """A tensor in memory of its own; KeyError for a key that no file holds."""
        tensor: Tensor = self._place[key].get_tensor(key)
        return tensor

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under ``<prefix>.``, by what follows it."""
        start = f"{prefix}."
        return {key[len(start) :]: self.read(key) for key in self._place if key.startswith(start)}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape from the header."""
        return tuple(self._place[key].get_slice(key).get_shape())

    def stored_dtype(self, key: str) -> str:
        """As the header names it: "F32", "U8", ..."""
        dtype: str = self._place[key].get_slice(key).get_dtype()
        return dtype


def _files(folder: Path) -> list[Path]:
    """The weight files, in the order transformers looks for them."""
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX} is damaged ({error!r}); save the checkpoint again") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: download or save the checkpoint again")
    return [folder / name for name in names]
