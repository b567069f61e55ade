"""Compiling: once, into a cache; and what happens where it cannot be done."""

import errno
import logging
import shutil
import stat
import sys
from contextlib import contextmanager

import pytest
import torch

from optimum_mobilequant.kernels import choose, cpp, registry
from optimum_mobilequant.kernels.bundle import bundle
from optimum_mobilequant.kernels.cpp import build as building
from optimum_mobilequant.kernels.cpp.build import BuildError, build_library, library_file
from optimum_mobilequant.kernels.cpp.library import ISA_VARIABLE, Library
from optimum_mobilequant.kernels.tuning import Passes
from optimum_mobilequant.kernels.tuning.build import build_passes, passes_name
from tests.kernels.layers import OUTPUTS, library, make
from tests.kernels.test_registry import spec

USUAL = None if cpp.available() else library_file()  # of the user's own cache, before any test changes the folder
compiled_here = pytest.mark.skipif(bool(cpp.available()), reason=f"compiled kernels: {cpp.available()}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has not asked for the kernels yet."""
    asked = (cpp.library, cpp.available, registry.unavailable)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    for function in asked:
        function.cache_clear()
    yield tmp_path / "cache"
    for function in asked:
        function.cache_clear()


LIBRARY_LOGGER = "transformers.optimum_mobilequant.kernels.cpp.library"


@contextmanager
def logged(*names):
    """What loggers say meanwhile."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield found
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)


@pytest.fixture
def messages():
    """What is said about kernels that are not used."""
    with logged(registry.logger.name, LIBRARY_LOGGER) as found:
        yield found


@pytest.fixture(autouse=True)
def without_matrix_units(monkeypatch):
    """With them 8-bit layers go to oneDNN first, and nobody asks for the kernels that are built here."""
    monkeypatch.setattr(registry, "has_amx", lambda: False)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return r"no C\+\+ compiler: g\+\+, clang\+\+, c\+\+ not found; install g\+\+ or set CXX"


def named_compiler_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    return "no C.. compiler: no-such-compiler not found"


def failing_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", 'echo "kernel.cpp:1: error: out of luck" >&2; exit 1'))
    return "fails on the CPU kernels: kernel.cpp:1: error: out of luck"


def read_only_cache(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(building.tempfile, "mkdtemp", refuse)
    return r"cannot be written \(Read-only file system\); set TORCH_EXTENSIONS_DIR"


def a_file_for_a_cache(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    return "cannot be written"


FAULTS = [no_compiler, named_compiler_missing, failing_compiler, read_only_cache, a_file_for_a_cache]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_backend_and_one_message(fault, cache, messages, monkeypatch, tmp_path):
    expected = fault(monkeypatch, tmp_path)
    with pytest.raises(BuildError, match=expected):
        build_library()
    layer = make(2, 20, 16)
    first, second = (layer.prepare(OUTPUTS["codes"]) for _ in range(2))
    assert first.choice.backend.name == second.choice.backend.name != "cpp"
    assert torch.equal(first(layer.x), second(layer.x))
    about_cpp = [message for message in messages if "'cpp'" in message]
    assert len(about_cpp) == 1 and first.choice.reasons["cpp"] in about_cpp[0]
    if cache.is_dir():
        assert not list(cache.rglob("*.so")) and not list(cache.rglob(".building-*"))


def test_a_layer_that_needs_no_compiling_compiles_nothing(cache, messages, monkeypatch, tmp_path):
    no_compiler(monkeypatch, tmp_path)
    assert choose(spec(device="cuda")).backend.name in ("triton", "simulate")
    assert not [message for message in messages if "'cpp'" in message] and not cache.exists()


@pytest.fixture
def few_units(monkeypatch):
    """Only the best instruction set and the portable one, without optimization: a second instead of several."""
    best = library().isa
    kept = tuple(unit for unit in building.units() if unit.isa in (best, "generic"))
    monkeypatch.setattr(building, "units", lambda: kept)
    monkeypatch.setattr(building, "_FLAGS", ("-O0", *building._FLAGS[1:]))


@compiled_here
def test_compiled_once_and_then_read(few_units, cache, monkeypatch, tmp_path):
    first = build_library()
    assert first == library_file() and first.parent == cache / "optimum_mobilequant"
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    Library(first)  # loads, and computes what it should
    read_only_cache(monkeypatch, tmp_path)
    no_compiler(monkeypatch, tmp_path)
    assert build_library() == first  # neither a compiler nor a folder to write is needed any more
    monkeypatch.setattr(building, "_FLAGS", ("-O2", *building._FLAGS[1:]))
    assert library_file() != first
    with pytest.raises(BuildError):
        build_library()


@compiled_here
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels go into wheels for Linux")
def test_kernels_that_came_with_the_package(few_units, cache, messages, monkeypatch, tmp_path):
    """Neither a compiler nor a folder to write is needed, and the threads are torch's."""
    made = bundle(tmp_path / "bundled")
    assert [path.name for path in made] == [building.library_name(), passes_name()]
    for path in made:
        assert b"libgomp.so" not in path.read_bytes() and b"libstdc++.so" not in path.read_bytes()
    monkeypatch.setattr(building, "BUNDLED", tmp_path / "bundled")
    read_only_cache(monkeypatch, tmp_path)
    no_compiler(monkeypatch, tmp_path)
    assert [build_library(), build_passes()] == made
    assert cpp.available() is None and cpp.library().threaded
    layer = make(2, 20, 16)
    run = layer.prepare(OUTPUTS["codes"])
    assert run.choice.backend.name == "cpp"
    assert torch.equal(run(layer.x), layer.prepare(OUTPUTS["codes"], "reference")(layer.x))
    Passes(build_passes())
    assert not messages and not cache.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / made[0].name).write_text("not a library")  # or one that needs a newer C library
    monkeypatch.setattr(building, "BUNDLED", other)
    with pytest.raises(BuildError, match="no C.. compiler"):
        build_library()


@compiled_here
def test_kernels_that_compute_wrongly_are_not_used(few_units, cache, messages, monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    shutil.copytree(building._HERE, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (sources / "vector.h").read_text(encoding="utf-8")
    wrong = text
    rights = ("_mm512_slli_epi16(v, 4)", "_mm256_slli_epi16(v, 4)", "_mm256_srli_epi16(v, 4)", "vshlq_n_s8(v, 4)")
    for right in rights:
        assert right in text
        wrong = wrong.replace(right, right.replace("4)", "5)"))
    (sources / "vector.h").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(building, "_HERE", sources)
    best = library().isa
    if best == "generic":
        pytest.skip("the portable kernel is what the others are checked against")
    assert choose(spec()).backend.name == "cpp" and cpp.library().isa == "generic"
    assert len(messages) == 1 and f"the compiled {best} kernels compute wrong results" in messages[0]
    assert "generic takes their place" in messages[0]
    asked = (cpp.library, cpp.available, registry.unavailable)
    for function in asked:
        function.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, best)  # asked for by name, it is an error of that backend
    assert choose(spec()).backend.name != "cpp"
    assert "compute wrong results" in cpp.available()
    assert len([message for message in messages if "'cpp'" in message]) == 1


@compiled_here
def test_a_compiler_that_lacks_an_instruction_set(few_units, cache, monkeypatch, tmp_path):
    flag = building.units()[0].flags[-1] if building.units()[0].flags else "-none"
    real = building.find_compiler()
    refuse = f'for flag in "$@"; do [ "$flag" = "{flag}" ] && echo "error: unknown {flag}" >&2 && exit 1; done'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f'{refuse}\nexec {real} "$@"'))
    assert Library(build_library()).instruction_sets[-1:] == ("generic",)
    assert library().isa not in Library(build_library()).instruction_sets or library().isa == "generic"


@compiled_here
def test_a_file_that_is_no_library(cache, messages):
    library_file().parent.mkdir(parents=True)
    library_file().write_text("not a library")
    assert choose(spec()).backend.name != "cpp"
    assert "cannot be loaded" in cpp.available() and "to compile again" in cpp.available()


@compiled_here
def test_an_instruction_set_by_name(monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "generic")
    assert Library(USUAL).isa == "generic"
    monkeypatch.setenv(ISA_VARIABLE, "avx1024")
    with pytest.raises(BuildError, match="MOBILEQUANT_ISA=avx1024 is not one of .*generic, which run on this"):
        Library(USUAL)


@compiled_here
def test_threads_are_those_of_torch():
    assert Library(USUAL).threaded or not torch.backends.openmp.is_available()
