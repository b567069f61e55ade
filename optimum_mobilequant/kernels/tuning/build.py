"""Finds the compiled passes, or compiles passes.cpp once for a user, into the cache folder of the other kernels."""

from __future__ import annotations

from pathlib import Path

from ..cpp.build import BuildError, Threads, bundled, cached_file, kept, run, thread_flags, versioned

_SOURCE = Path(__file__).with_name("passes.cpp")
# -ffp-contract=off: a fused multiply-add would round differently from torch's operations.
_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip


def passes_file() -> Path:
    """The path that the compiled passes have in the cache, whether they exist or not."""
    return cached_file(passes_name())


def passes_name() -> str:
    """File name of the passes that came with the package."""
    return versioned("tuning", [_SOURCE], _FLAGS)


def build_passes() -> Path:
    """The compiled passes: those that came with the package, from the cache, or compiled now.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache folder that cannot be written.
    """
    return bundled(passes_name()) or kept(passes_file(), "the passes of tuning", compile_passes)


def compile_passes(compiler: str, folder: Path, threads: Threads | None = None) -> Path:
    """``folder/passes.so``. ``threads``: flags for OpenMP; None for those of this machine."""
    part, made = folder / "passes.o", folder / "passes.so"
    threads = threads or thread_flags(compiler, folder)
    # In two commands: told of OpenMP, the linker takes the system's own library of it.
    compiled = [compiler, *_FLAGS, *threads.compile, "-c", str(_SOURCE), "-o", str(part)]
    for command in (compiled, [compiler, "-shared", "-o", str(made), str(part), *threads.link]):
        if error := run(command):
            raise BuildError(f"{compiler} fails on the passes of tuning: {error}")
    return made
