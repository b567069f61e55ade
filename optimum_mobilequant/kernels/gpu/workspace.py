"""Memory in which the programs of a split product meet: one piece for each device and stream, made beforehand.

It is never made while a CUDA graph is being captured. All graphs of a device share one piece: two of them must not
replay at the same time in different streams (as with cuBLAS, whose workspace they share as well).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_PROGRAMS = 1024  # tiles times parts
_TILE = 4096  # sums of a tile


@dataclass(frozen=True)
class Workspace:
    """``counters``: int32 ``[programs]``, 0 between launches. ``partial``: int32 sums, of any content."""

    counters: Tensor
    partial: Tensor


_PIECES: dict[tuple[str, int | None, int | str], Workspace] = {}
_GRAPHS = "graphs"


def fits(tiles: int, parts: int, block_n: int, block_m: int) -> bool:
    """Whether a product cut this way finds room."""
    return tiles * parts <= MOST_PROGRAMS and block_n * block_m <= _TILE


def workspace_of(device: torch.device) -> Workspace:
    """The piece of the current stream of a device.

    Raises:
        RuntimeError: a graph is being captured, and no layer was packed or called on this device before.
    """
    stream: int | str = 0
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        stream = _GRAPHS if capturing else torch.cuda.current_stream(device).cuda_stream
        if capturing and (device.type, device.index, stream) not in _PIECES:
            raise RuntimeError("no workspace for a CUDA graph: call the layer once before capturing it")
        if (device.type, device.index, _GRAPHS) not in _PIECES:
            _PIECES[device.type, device.index, _GRAPHS] = _make(device)
    key = (device.type, device.index, stream)
    if key not in _PIECES:
        _PIECES[key] = _make(device)
    return _PIECES[key]


def _make(device: torch.device) -> Workspace:
    counters = torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)
    partial = torch.empty(MOST_PROGRAMS * _TILE, dtype=torch.int32, device=device)
    return Workspace(counters, partial)
