"""Compiles passes.cpp once for a user, into the cache folder of the other kernels."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from ...log import get_logger
from ..cpp.build import BuildError, _run, _thread_flags, cache_folder, find_compiler

logger = get_logger(__name__)

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
    if sys.platform == "win32":
        raise BuildError("they are for Linux and macOS")
    target = passes_file()
    if target.is_file():
        return target
    compiler = find_compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    except OSError as error:
        raise BuildError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}); set TORCH_EXTENSIONS_DIR"
        ) from None
    try:
        logger.info(f"compiling the passes of tuning with {compiler} (once, some seconds)")
        made, threads = folder / "passes.so", _thread_flags(compiler, folder)
        command = [compiler, *_FLAGS, *threads.compile, "-shared", str(_SOURCE), "-o", str(made), *threads.link]
        if failure := _run(command):
            raise BuildError(f"{compiler} fails on them: {failure}")
        os.replace(made, target)  # complete or not there, whoever else compiles now
    except OSError as error:
        raise BuildError(f"they cannot be stored in {target.parent}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
