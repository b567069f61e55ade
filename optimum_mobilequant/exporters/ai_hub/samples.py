"""Integer inputs for one run of each graph on the device: the first tokens of a text, with nothing in the cache
but a prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .folders import GraphFolder, IOTensor

# Base of the rotary angles where none are given: any rotation is a valid input.
_ROTARY_BASE = 10000.0
Table = NDArray[np.float64]


def sample_inputs(
    graph: GraphFolder,
    token_ids: Sequence[int] = (1,),
    *,
    rotary: tuple[Table, Table] | None = None,
    prefix: Mapping[str, NDArray[np.generic]] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Codes for every input of ``graph``, in its order.

    Args:
        graph: inputs named as in the qnn target: ``input_ids`` ``[1, S]``, ``attention_mask`` ``[1, 1, S, C]`` over
            past and new tokens, ``position_ids_cos`` and ``position_ids_sin`` ``[1, 1, S, rotary / 2]``,
            ``past_key_<layer>_in`` and ``past_value_<layer>_in``.
        token_ids: repeated or cut to S tokens.
        rotary: cos and sin of the tokens' positions, each ``[S, rotary / 2]``.
        prefix: codes that the first places of the cache hold, of :func:`~..prefix.prefix_buffers`; None for an empty
            cache.

    Returns:
        Arrays of the shapes and integer types of ``graph.inputs``.

    Raises:
        ValueError: an input of another name.
    """
    tables = dict(zip(("position_ids_cos", "position_ids_sin"), rotary or (), strict=False))
    feeds = {}
    for tensor in graph.inputs:
        if tensor.name == "input_ids":
            feeds[tensor.name] = np.resize(np.asarray(token_ids), tensor.shape).astype(tensor.dtype)
            continue
        rule = next((rule for prefix, rule in _RULES.items() if tensor.name.startswith(prefix)), None)
        if rule is None:
            raise ValueError(f"{graph.name} has the input {tensor.name!r}, for which no sample is known")
        table = tables.get(tensor.name)
        real = rule(tensor.shape) if table is None else np.broadcast_to(table, tensor.shape)
        feeds[tensor.name] = _codes(tensor, real)
    for name, codes in (prefix or {}).items():
        places = tuple(slice(size) for size in codes.shape)
        feeds[name][places] = codes
        length = codes.shape[3 if "key" in name else 2]
        feeds["attention_mask"][..., :length] = _codes(_tensor(graph, "attention_mask"), np.zeros(()))
    return feeds


def _tensor(graph: GraphFolder, name: str) -> IOTensor:
    return next(tensor for tensor in graph.inputs if tensor.name == name)


def digest_of(feeds: Mapping[str, NDArray[np.generic]]) -> str:
    """BLAKE2b, hexadecimal, of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=32)
    for name, array in feeds.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _codes(tensor: IOTensor, real: Table) -> NDArray[np.generic]:
    """Codes of real numbers; beyond the grid they saturate. The rule is that of ``numerics``, in numpy."""
    if tensor.scale is None or tensor.zero_point is None:
        raise ValueError(f"{tensor.name} has no scale and zero point: export with the qnn target again")
    limits = np.iinfo(tensor.dtype)
    codes = np.clip(np.rint(real / tensor.scale) + tensor.zero_point, limits.min, limits.max)
    return codes.astype(tensor.dtype)


def _mask(shape: tuple[int, ...]) -> Table:
    """0 where a new token may look, else far below any score: the cache is empty, so only new tokens up to itself."""
    new, total = shape[-2:]
    column, row = np.arange(total)[None, :], np.arange(new)[:, None]
    visible = (column >= total - new) & (column - (total - new) <= row)
    return np.broadcast_to(np.where(visible, 0.0, -np.inf), shape)


def _angles(shape: tuple[int, ...]) -> Table:
    new, half = shape[-2:]
    return np.broadcast_to(np.arange(new)[:, None] * _ROTARY_BASE ** (-np.arange(half) / half), shape)


_RULES: dict[str, Callable[[tuple[int, ...]], Table]] = {
    "attention_mask": _mask,
    "position_ids_cos": lambda shape: np.cos(_angles(shape)),
    "position_ids_sin": lambda shape: np.sin(_angles(shape)),
    "past_": np.zeros,
}
