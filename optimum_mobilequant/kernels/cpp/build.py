"""Finds the compiled kernels: those that came with the package, or compiled once for a user, into a cache folder.

The sources include neither Python's nor torch's headers: a compiler and a few seconds are all that is needed. The file
name holds a hash of the sources, the flags and the kind of processor, in the cache of the torch version too; nothing
else is ever loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...log import get_logger

logger = get_logger(__name__)

_HERE = Path(__file__).parent
BUNDLED = _HERE.parent / "bundled"  # filled by ``kernels.bundle``, for wheels of one platform
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
    return cached_file(library_name())


def library_name() -> str:
    """File name of the kernels that came with the package."""
    return versioned("linear", [_HERE / name for name in _SOURCES], _FLAGS, units())


def versioned(kind: str, sources: Sequence[Path], *how: object) -> str:
    """A file name that holds a hash of sources, of how they are compiled and of what for."""
    key = hashlib.sha256()
    for path in sources:
        key.update(path.read_bytes())
    key.update(repr((how, platform.machine(), sys.platform)).encode())
    return f"{kind}-{key.hexdigest()[:20]}.so"


def cached_file(name: str) -> Path:
    """Where a library of this name is cached: beside whatever OpenMP this version of torch brought."""
    path = Path(name)
    return cache_folder() / f"{path.stem}-{hashlib.sha256(torch.__version__.encode()).hexdigest()[:8]}{path.suffix}"


def build_library() -> Path:
    """The compiled kernels: those that came with the package, from the cache, or compiled now.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that cannot be written.
    """
    return bundled(library_name()) or kept(library_file(), "the compiled kernels", compile_library)


def compiled_library() -> Path | None:
    """The kernels that would be loaded here without compiling anything, or None."""
    return bundled(library_name()) or (path if (path := library_file()).is_file() else None)


def bundled(name: str) -> Path | None:
    """A library that came with the package, if there is one of this name and it can be loaded here."""
    path = BUNDLED / name
    if not path.is_file():
        return None
    try:
        # It leaves OpenMP open, so that threads are torch's own: its library must be visible to others.
        for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(path))
    except OSError as error:
        logger.info(f"the kernels that came with this package cannot be loaded and are compiled instead: {error}")
        return None
    return path


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


def compile_library(compiler: str, folder: Path, threads: Threads | None = None) -> Path:
    """All units and the dispatcher, linked to ``folder/linear.so``.

    A unit that this compiler does not know is left out; the portable one must compile.

    Args:
        threads: flags for OpenMP; None for those of this machine.
    """
    threads = threads or thread_flags(compiler, folder)
    objects, have = [], []
    for unit in units():
        out = folder / f"{unit.isa}.o"
        macros = [f"-DMQ_ISA={unit.isa}_isa", f"-DMQ_{unit.isa.upper()}", *unit.macros]
        error = run([compiler, *_FLAGS, *unit.flags, *macros, "-c", str(_HERE / "kernel.cpp"), "-o", str(out)])
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
        if error := run(command):
            raise BuildError(f"{compiler} fails on the CPU kernels: {error}")
    return folder / "linear.so"


@dataclass(frozen=True)
class Threads:
    """Flags for OpenMP."""

    compile: tuple[str, ...]
    link: tuple[str, ...]


def thread_flags(compiler: str, folder: Path) -> Threads:
    """Flags for OpenMP, or none where the compiler has none (one thread is used then)."""
    source = folder / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", encoding="utf-8")
    # The library that torch brought: the threads are then torch's own.
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        flags = Threads(("-fopenmp",), (str(library),))
        if _links(compiler, source, flags):
            return flags
    flags = Threads(("-fopenmp",), ("-fopenmp",))
    if _links(compiler, source, flags):
        return flags
    logger.warning(f"{compiler} has no OpenMP: the CPU kernels will use one thread")
    return Threads((), ())


def _links(compiler: str, source: Path, flags: Threads) -> bool:
    made = source.with_suffix(".o")
    compiled = run([compiler, *flags.compile, "-c", str(source), "-o", str(made)]) is None
    return compiled and run([compiler, str(made), *flags.link, "-o", str(source.with_suffix(".out"))]) is None


def run(command: list[str]) -> str | None:
    """None, or the first line that says what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}")
