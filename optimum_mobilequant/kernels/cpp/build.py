"""Compiles the kernels once for a user, into a cache folder.

The sources include neither Python's nor torch's headers: a compiler and a few seconds are all that is needed. The file
name holds a hash of the sources, the flags, the torch version and the kind of processor; nothing else is ever loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...log import get_logger

logger = get_logger(__name__)

_HERE = Path(__file__).parent
_SOURCES = (
    "linear.h", "vector.h", "rows.h", "attention.h", "tiles.h", "kernel.cpp",  # compiled for each instruction set
    "layer.h", "scratch.h", "layer.cpp", "dispatch.cpp",
)  # fmt: skip
_PLAIN = ("layer.cpp", "dispatch.cpp")  # compiled once
# -ffp-contract=off: a fused multiply-add would round differently on different machines.
_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
_TIMEOUT = 300  # seconds for one run of the compiler


@dataclass(frozen=True)
class Unit:
    """kernel.cpp for one instruction set: name, flags that let the compiler use it, macros beside its own."""

    isa: str
    flags: tuple[str, ...]
    macros: tuple[str, ...] = ()


_GENERIC = Unit("generic", ())
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_X86 = (
    # Many rows by matrix units, the rest as avx512vnni.
    Unit("amx", (*_AVX512, "-mamx-tile", "-mamx-int8"), ("-DMQ_AVX512VNNI", "-DMQ_TILES")),
    Unit("avx512vnni", _AVX512), Unit("avxvnni", ("-mavx2", "-mavxvnni")), Unit("avx2", ("-mavx2",)), _GENERIC,
)  # fmt: skip
_UNITS = {
    "x86_64": _X86,
    "amd64": _X86,
    "aarch64": (Unit("neon", ("-march=armv8.2-a+dotprod",)), _GENERIC),
    "arm64": (Unit("neon", ("-march=armv8.2-a+dotprod",)), _GENERIC),
}


class BuildError(RuntimeError):
    """The kernels cannot be compiled, stored, loaded or trusted on this machine."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: in TORCH_EXTENSIONS_DIR, or in the user's cache folder (XDG_CACHE_HOME)."""
    if extensions := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(extensions) / "optimum_mobilequant"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimum_mobilequant" / "kernels"


def units() -> tuple[Unit, ...]:
    """What is compiled for this kind of processor; elsewhere than on x86-64 and ARM only the portable kernel."""
    return _UNITS.get(platform.machine().lower(), (_GENERIC,))


def library_file() -> Path:
    """The path that the compiled kernels have in the cache, whether they exist or not."""
    key = hashlib.sha256()
    for name in _SOURCES:
        key.update((_HERE / name).read_bytes())
    key.update(repr((_FLAGS, units(), torch.__version__, platform.machine(), sys.platform)).encode())
    return cache_folder() / f"linear-{key.hexdigest()[:20]}.so"


def build_library() -> Path:
    """The compiled kernels, from the cache or compiled now.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that cannot be written.
    """
    return kept(library_file(), "the compiled kernels", _compile)


def kept(target: Path, what: str, make: Callable[[str, Path], Path]) -> Path:
    """``target``, made now if it is not there, complete or not at all, whoever else makes it at the same time.

    Args:
        what: is made, in the words of messages. make: compiles it with a compiler in a folder, and says where.

    Raises:
        BuildError: as :func:`build_library`.
    """
    if sys.platform == "win32":
        raise BuildError(f"{what} are for Linux and macOS")
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
        logger.info(f"compiling {what} with {compiler} (once, some seconds)")
        os.replace(make(compiler, folder), target)
    except OSError as error:
        raise BuildError(f"{what} cannot be stored in {target.parent}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def find_compiler() -> str:
    """Path of the C++ compiler: the variable CXX, or g++, clang++ or c++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: {named or 'g++, clang++, c++'} not found; install g++ or set CXX")


def _compile(compiler: str, folder: Path) -> Path:
    """All units and the dispatcher, linked to ``folder/linear.so``.

    A unit that this compiler does not know is left out; the portable one must compile.
    """
    threads = _thread_flags(compiler, folder)
    objects, have = [], []
    for unit in units():
        out = folder / f"{unit.isa}.o"
        macros = [f"-DMQ_ISA={unit.isa}_isa", f"-DMQ_{unit.isa.upper()}", *unit.macros]
        error = _run([compiler, *_FLAGS, *unit.flags, *macros, "-c", str(_HERE / "kernel.cpp"), "-o", str(out)])
        if error is None:
            objects.append(str(out))
            have.append(f"-DMQ_HAVE_{unit.isa.upper()}")
        elif unit.isa == "generic":
            raise BuildError(f"{compiler} fails on the CPU kernels: {error}")
        else:
            logger.debug(f"{compiler} cannot compile the {unit.isa} kernels: {error}")
    plain = [(str(_HERE / name), str(folder / f"{name}.o")) for name in _PLAIN]
    compile_plain = [[compiler, *_FLAGS, *threads.compile, *have, "-c", s, "-o", o] for s, o in plain]
    objects += [o for _, o in plain]
    # A process may load two of these libraries: neither may find the other's functions in the place of its own.
    own = ["-Wl,-Bsymbolic"] if sys.platform.startswith("linux") else []
    link = [compiler, "-shared", *own, "-o", str(folder / "linear.so"), *objects, *threads.link]
    for command in (*compile_plain, link):
        if error := _run(command):
            raise BuildError(f"{compiler} fails on the CPU kernels: {error}")
    return folder / "linear.so"


@dataclass(frozen=True)
class _Threads:
    compile: tuple[str, ...]
    link: tuple[str, ...]


def _thread_flags(compiler: str, folder: Path) -> _Threads:
    """Flags for OpenMP, or none where the compiler has none (one thread is used then)."""
    source = folder / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", encoding="utf-8")
    # The library that torch brought: the threads are then torch's own.
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        flags = _Threads(("-fopenmp",), (str(library),))
        if _links(compiler, source, flags):
            return flags
    flags = _Threads(("-fopenmp",), ("-fopenmp",))
    if _links(compiler, source, flags):
        return flags
    logger.warning(f"{compiler} has no OpenMP: the CPU kernels will use one thread")
    return _Threads((), ())


def _links(compiler: str, source: Path, flags: _Threads) -> bool:
    made = source.with_suffix(".o")
    compiled = _run([compiler, *flags.compile, "-c", str(source), "-o", str(made)]) is None
    return compiled and _run([compiler, str(made), *flags.link, "-o", str(source.with_suffix(".out"))]) is None


def _run(command: list[str]) -> str | None:
    """None, or the first line that says what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}")
