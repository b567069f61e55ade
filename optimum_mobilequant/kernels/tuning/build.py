"""Compiles passes.cpp once for a user, into the cache folder of the other kernels."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path

import torch

from ..cpp.build import BuildError, _run, _thread_flags, cache_folder, kept

_SOURCE = Path(__file__).with_name("passes.cpp")
# -ffp-contract=off: a fused multiply-add would round differently from torch's operations.
_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip


def passes_file() -> Path:
    """The path that the compiled passes have in the cache, whether they exist or not."""
    key = hashlib.sha256(_SOURCE.read_bytes())
    key.update(repr((_FLAGS, torch.__version__, platform.machine(), sys.platform)).encode())
    return cache_folder() / f"tuning-{key.hexdigest()[:20]}.so"


def build_passes() -> Path:
    """The compiled passes, from the cache or compiled now.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that cannot be written.
    """
    return kept(passes_file(), "the passes of tuning", _compile)


def _compile(compiler: str, folder: Path) -> Path:
    made, threads = folder / "passes.so", _thread_flags(compiler, folder)
    command = [compiler, *_FLAGS, *threads.compile, "-shared", str(_SOURCE), "-o", str(made), *threads.link]
    if error := _run(command):
        raise BuildError(f"{compiler} fails on the passes of tuning: {error}")
    return made
