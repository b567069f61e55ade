"""The configuration of a call: the table's, or a better one that was measured on this GPU before and kept on disk.

Nothing is measured unless :func:`tune` is called. It writes one JSON file for a GPU model and a version of the
kernels, whole or not at all; every later process reads it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...log import get_logger
from ..cpp.build import cache_folder
from .configs import SHARED_MEMORY, Config, bucket
from .device import architecture_of, name_of

logger = get_logger(__name__)

_HERE = Path(__file__).parent
_SOURCES = (
    "configs.py", "epilogue.py", "layout.py", "linear.py", "nibbles.py", "product.py", "real_linear.py",
    "real_product.py",
)  # fmt: skip
Measure = Callable[[Config], float]


def best(kind: str, out_features: int, in_features: int, rows: int, device: torch.device) -> Config:
    """The configuration for a call: measured if there is one for this GPU, width and number of rows, else the table's.

    Args:
        kind: one of :data:`~.configs.KINDS`.
    """
    row = bucket(architecture_of(device), kind, rows)
    found = _known(name_of(device)).get(_key(kind, out_features, in_features, row.most_rows))
    return found or row.config


def tune(
    kind: str, out_features: int, in_features: int, rows: int, device: torch.device, measure: Measure
) -> dict[Config, float]:
    """Measure the candidates for a call, keep the fastest on disk, and use it from now on.

    Args:
        measure: seconds of one call with a configuration; one that raises RuntimeError (too much shared memory, say)
            is left out. :func:`measured` makes one.

    Returns:
        Seconds of each candidate that ran.

    Raises:
        RuntimeError: no candidate ran; the message is the last one's.
        OSError: the cache folder cannot be written (TORCH_EXTENSIONS_DIR names another).
    """
    row = bucket(architecture_of(device), kind, rows)
    seconds: dict[Config, float] = {}
    failure: RuntimeError | None = None
    for config in candidates(row.config, architecture_of(device)):
        try:
            seconds[config] = measure(config)
        except RuntimeError as error:
            failure = error
            logger.debug(f"{config} does not run: {error}")
    if not seconds:
        raise RuntimeError(f"no configuration runs for {kind} {out_features}x{in_features}: {failure}") from failure
    winner = min(seconds, key=lambda config: seconds[config])
    _keep(name_of(device), {_key(kind, out_features, in_features, row.most_rows): winner})
    return seconds


def candidates(start: Config, arch: str) -> list[Config]:
    """The configurations that :func:`tune` compares: ``start`` and its neighbours, each once, ``start`` first."""
    found = [start]
    for block_n in {start.block_n // 2, start.block_n, start.block_n * 2} & {16, 32, 64, 128}:
        for warps in (2, 4, 8):
            for stages in (3, 4, 6, 8):
                for parts in (1, 2, 4, 8, 16) if start.parts else (0,):
                    config = replace(start, block_n=block_n, warps=warps, stages=stages, parts=parts)
                    tile = stages * (config.block_n + config.block_m) * 128  # bytes, of the widest kind
                    if config.block_n >= 8 * warps and tile <= SHARED_MEMORY[arch] and config not in found:
                        found.append(config)
    return found


def measured(call: Callable[[Config], object], *, repeats: int = 20) -> Measure:
    """Seconds of ``call`` by CUDA events: the median of ``repeats`` calls after three that are not counted."""

    def measure(config: Config) -> float:
        times = []
        for turn in range(repeats + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call(config)
            end.record()
            end.synchronize()
            if turn >= 3:
                times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    return measure


def cache_file(gpu: str) -> Path:
    """Where the measured configurations of a GPU model are kept for this version of the kernels."""
    import triton

    key = hashlib.sha256(triton.__version__.encode())
    for name in _SOURCES:
        key.update((_HERE / name).read_bytes())
    model = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    return cache_folder() / f"gpu-{model}-{key.hexdigest()[:16]}.json"


def _key(kind: str, out_features: int, in_features: int, most_rows: int | None) -> str:
    return f"{kind} {out_features}x{in_features} rows {'any' if most_rows is None else f'<= {most_rows}'}"


@cache
def _known(gpu: str) -> dict[str, Config]:
    """What was measured for a GPU model. A file that cannot be read is reported and not used."""
    path = cache_file(gpu)
    try:
        return {key: Config(**values) for key, values in _read(path).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning(f"measured configurations in {path} are not used ({error}); delete the file to tune again")
        return {}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _keep(gpu: str, found: dict[str, Config]) -> None:
    """Add to the file, in one step: a reader sees the old file or the new one."""
    path = cache_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _known(gpu)
    try:
        kept = _read(path)  # another process may have written since
    except ValueError:
        kept = {}
    kept.update({key: asdict(config) for key, config in found.items()})
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(kept, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    known.update(found)
