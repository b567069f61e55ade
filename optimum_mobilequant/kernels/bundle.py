"""Compiles the kernels into the package, for a wheel that needs no compiler where it is installed.

    python -m optimum_mobilequant.kernels.bundle

A wheel built from the same checkout afterwards carries them and a tag of this platform (see ``hatch_build.py``). They
choose among instruction sets when they are loaded, like those that are compiled for a user, and need the C library
alone: OpenMP is left open, since torch has loaded one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from .cpp.build import BUNDLED, BuildError, Threads, compile_library, find_compiler, library_name
from .tuning.build import compile_passes, passes_name

_OPEN = Threads(("-fopenmp",), ("-static-libstdc++", "-static-libgcc", "-Wl,--strip-all"))


def bundle(folder: Path = BUNDLED) -> list[Path]:
    """Compile the kernels and the passes of tuning into ``folder``, in place of what it holds.

    Raises:
        BuildError: no compiler, a failed compilation, or another system than Linux.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError("kernels go into wheels for Linux only; elsewhere they are compiled on first use")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        made = {
            name: make(compiler, Path(scratch), _OPEN)
            for name, make in ((library_name(), compile_library), (passes_name(), compile_passes))
        }
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return [Path(shutil.copy(path, folder / name)) for name, path in made.items()]


if __name__ == "__main__":
    for path in bundle():
        print(path)
