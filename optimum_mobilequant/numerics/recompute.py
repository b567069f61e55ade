"""Values that the backward pass recomputes instead of keeping.

A rounded tensor follows from the tensor it was rounded from, which its own gradient needs anyway. Marked with
:func:`follows_from`, it is not kept by the operations that read it: inside :func:`recomputing` autograd notes how
it is made, and makes it again, bit for bit, when a gradient asks for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MARK = "mobilequant_origin"
_LAST = 4


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
    with torch.autograd.graph.saved_tensors_hooks(_keep, _Maker()):
        yield


def _keep(tensor: Tensor) -> Any:
    origin = getattr(tensor.untyped_storage(), _MARK, None)
    if origin is None or tensor._version != origin.version:  # written to since: no longer what its origin makes
        return _Kept(tensor, tensor._version)
    return _View(origin, tensor.size(), tensor.stride(), tensor.storage_offset())


class _Maker:
    """Makes tensors again. The last few stay: the operations that read one tensor follow each other in a backward
    pass, and so does the rounding that made it."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, tuple[_Origin, Tensor, int]] = OrderedDict()

    def __call__(self, kept: Any) -> Tensor:
        if isinstance(kept, _Kept):
            if kept.tensor._version != kept.version:
                raise RuntimeError("a tensor that the backward pass needs was changed in place after it was computed")
            return kept.tensor
        return self._of(kept.origin).as_strided(kept.size, kept.stride, kept.offset)

    def _of(self, origin: _Origin) -> Tensor:
        found = self._made.get(id(origin))
        if found is not None and found[1]._version == found[2]:
            self._made.move_to_end(id(origin))
            return found[1]
        made = origin.make(*(self(part) for part in origin.inputs))
        self._made[id(origin)] = origin, made, made._version  # the origin is held, so its id stays its own
        if len(self._made) > _LAST:
            self._made.popitem(last=False)
        return made
