"""Values that the backward pass recomputes instead of keeping.

A rounded tensor follows from the tensor it was rounded from, which its own gradient needs anyway. Marked with
:func:`follows_from`, it is not kept by the operations that read it: inside :func:`recomputing` autograd notes how
it is made, and makes it again, bit for bit, when a gradient asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MARK = "mobilequant_origin"


@dataclass(frozen=True)
class _Origin:
    """How the tensor that fills a storage was made."""

    make: Callable[..., Tensor]
    inputs: tuple[Any, ...]  # as _keep returns them
    version: int


@dataclass(frozen=True)
class _Kept:
    """A tensor and the number of writes it had seen."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class _View:
    """A view of what an origin makes."""

    origin: _Origin
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def follows_from(out: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Mark ``out`` as ``make(*inputs)``; returns it.

    Args:
        out: fills a storage of its own. make: must return the same values with the same strides each time.
    """
    origin = _Origin(make, tuple(_keep(t.detach()) for t in inputs), out._version)
    setattr(out.untyped_storage(), _MARK, origin)  # lives and dies with the memory it describes, views included
    return out


@contextmanager
def recomputing() -> Iterator[None]:
    """Graphs built inside keep no tensor that was marked by :func:`follows_from`."""
    with torch.autograd.graph.saved_tensors_hooks(_keep, _make):
        yield


def _keep(tensor: Tensor) -> Any:
    origin = getattr(tensor.untyped_storage(), _MARK, None)
    if origin is None or tensor._version != origin.version:  # written to since: no longer what its origin makes
        return _Kept(tensor, tensor._version)
    return _View(origin, tensor.size(), tensor.stride(), tensor.storage_offset())


def _make(kept: Any) -> Tensor:
    if isinstance(kept, _Kept):
        if kept.tensor._version != kept.version:
            raise RuntimeError("a tensor that the backward pass needs was changed in place after it was computed")
        return kept.tensor
    made = kept.origin.make(*(_make(part) for part in kept.origin.inputs))
    return made.as_strided(kept.size, kept.stride, kept.offset)
