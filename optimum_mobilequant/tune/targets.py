"""What the float teacher computes on the sequences of a run: once for each sequence, if it is used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.prefix import prepend


class _Stop(Exception):
    """Ends a forward pass once the wanted tensor is known."""


@contextmanager
def entering(model: nn.Module, path: str, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect what enters the submodule ``path``; with ``stop``, end the forward pass there."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        if stop:
            raise _Stop

    hook = model.get_submodule(path).register_forward_pre_hook(keep)
    try:
        yield seen
    except _Stop:
        pass
    finally:
        hook.remove()


class Targets:
    """Hidden states of the teacher, by sequence.

    Kept are hidden states, not logits: a vocabulary is larger than a hidden state by far, and the head takes a small
    part of the time. They are computed in the batches of ``rows``, whatever the order in which they are asked for: the
    rounding of a float sum may depend on the batch, and a run that resumes must see the same bits.

    Args:
        place: path of the module whose input is wanted: the head, or the final norm.
        rows: int64 ``[sequences, length]`` each: the sequences to keep. Others are computed whenever asked for.
        batch_size: of the teacher's forward passes on ``rows``.
        dtype: what the teacher computes in, ``"float32"`` or a reduced one (autocast).
        prefix: tokens that the teacher reads before each sequence; nothing is returned for them.
    """

    def __init__(
        self,
        place: str,
        rows: Sequence[Tensor] = (),
        *,
        batch_size: int = 1,
        dtype: str = "float32",
        prefix: Sequence[int] = (),
    ):
        self.place = place
        self.dtype = dtype
        self.prefix = prefix
        self._batches = [batch for part in rows for batch in part.split(batch_size)]
        self._places = {_key(row): (n, at) for n, batch in enumerate(self._batches) for at, row in enumerate(batch)}
        self._kept: dict[int, Tensor] = {}

    def __call__(self, teacher: nn.Module, ids: Tensor) -> Tensor:
        """What enters ``place`` on ``ids``: ``[sequences, length, hidden]``."""
        places = [self._places.get(_key(row)) for row in ids.cpu()]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return self._compute(teacher, ids)
        for n, _ in found:
            if n not in self._kept:
                self._kept[n] = self._compute(teacher, self._batches[n].to(ids.device))
        return torch.stack([self._kept[n][at] for n, at in found])

    def _compute(self, teacher: nn.Module, ids: Tensor) -> Tensor:
        with teacher_arithmetic(ids.device, self.dtype), entering(teacher, self.place, stop=True) as seen:
            teacher(input_ids=prepend(ids, self.prefix), use_cache=False)
        return seen[0][:, len(self.prefix) :]


@contextmanager
def teacher_arithmetic(device: torch.device, dtype: str) -> Iterator[None]:
    """No gradients, and the teacher's own dtype."""
    with torch.no_grad(), torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        yield


def _key(row: Tensor) -> bytes:
    return row.numpy().tobytes()
