"""The matrix-unit kernels (AMX), their instructions emulated: no such processor is needed, and none was ever used."""

import platform
import shutil
import subprocess

import pytest
import torch

from optimum_mobilequant.kernels import Output, cpp
from optimum_mobilequant.kernels.cpp import build as building
from optimum_mobilequant.kernels.cpp.build import BuildError, build_library
from optimum_mobilequant.kernels.cpp.library import Library
from tests.kernels.layers import OUTPUTS, make
from tests.kernels.test_build import LIBRARY_LOGGER, logged

compiled_here = pytest.mark.skipif(bool(cpp.available()), reason=f"compiled kernels: {cpp.available()}")
# Below 16 rows vectors compute; then one tile of rows, two, and more. Columns: less than a tile's 64, one, and more.
SHAPES = [
    (15, 64, 64), (16, 64, 64), (17, 3, 1), (25, 65, 63), (31, 128, 65), (32, 70, 128), (33, 64, 200), (70, 1, 321),
]  # fmt: skip


def build(folder, sources=building._HERE):
    """The kernels for emulated matrix units and the portable ones, compiled."""
    units = (building.Unit("amx", (), ("-DMQ_TILES",)), building.Unit("generic", ()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(building, "_HERE", sources)
        patch.setattr(building, "_FLAGS", ("-O0", *building._FLAGS[1:], "-DMQ_EMULATED_TILES"))
        patch.setattr(building, "units", lambda: units)
        return build_library()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"))


@compiled_here
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ragged_shapes_are_the_references_bit_for_bit(emulated, bits, symmetric, monkeypatch):
    kernels = Library(emulated)
    assert kernels.isa == "amx" and kernels.instruction_sets == ("amx", "generic") and not kernels.wrong
    monkeypatch.setattr(cpp, "library", lambda: kernels)
    for shape in SHAPES:
        layer = make(*shape, bits=bits, symmetric=symmetric)
        for output in (Output.totals(), *OUTPUTS.values()):
            expected = layer.prepare(output, "reference")(layer.x)
            assert torch.equal(layer.prepare(output, "cpp")(layer.x), expected), (shape, output)


@compiled_here
def test_extreme_codes_strides_and_threads(emulated, monkeypatch):
    kernels = Library(emulated)
    monkeypatch.setattr(cpp, "library", lambda: kernels)
    layer = make(100, 200, 150)
    layer.x.fill_(255)
    layer.codes.fill_(-128)
    spread = torch.full((100, 190), 3, dtype=torch.uint8)
    spread[:, 20:170] = layer.x
    expected, run = layer.totals(), layer.prepare(Output.totals(), "cpp")
    before = torch.get_num_threads()
    for threads in (1, 3):  # each thread configures the units for itself
        torch.set_num_threads(threads)
        try:
            assert torch.equal(run(spread[:, 20:170]).long(), expected)
        finally:
            torch.set_num_threads(before)
    wide = make(20, 66, 300, activation_bits=16)
    output = OUTPUTS["codes16"]
    assert torch.equal(wide.prepare(output, "cpp")(wide.x), wide.prepare(output, "reference")(wide.x))


@compiled_here
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("tiles.h", "static_cast<int8_t>(state.data[w]", "static_cast<uint8_t>(state.data[w]"),
        ("tiles.h", "memcpy(rows, x + r * ldx, 4 * groups);", ""),
        ("tiles.h", "kTileRows + row + i - second", "i"),
    ],
    ids=["signs", "columns left over", "rows left over"],
)
def test_units_that_compute_wrongly_give_way_to_the_next_instruction_set(file, right, wrong, tmp_path):
    """Also the proof that the comparisons above go through the matrix units, with all parts of them."""
    sources = tmp_path / "sources"
    shutil.copytree(building._HERE, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (sources / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong), encoding="utf-8")
    path = build(tmp_path / "cache", sources)
    with logged(LIBRARY_LOGGER) as messages:
        kernels = Library(path)
    assert (kernels.isa, kernels.wrong) == ("generic", ("amx",))
    assert len(messages) == 1 and "the compiled amx kernels compute wrong results" in messages[0]
    assert "generic takes their place" in messages[0]
    with pytest.raises(BuildError, match="the compiled amx kernels compute wrong results here"):
        Library(path, "amx")


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="for x86 processors")
@compiled_here
def test_the_instructions_are_emitted_and_the_units_released(tmp_path):
    compiler, unit = building.find_compiler(), building.units()[0]
    assert unit.isa == "amx"
    flags = ["-O1", *building._FLAGS[1:], "-Wall", "-Wextra", "-Werror", *unit.flags, "-DMQ_ISA=amx_isa", *unit.macros]
    done = subprocess.run(
        [compiler, *flags, "-S", str(building._HERE / "kernel.cpp"), "-o", str(tmp_path / "kernel.s")],
        capture_output=True,
        text=True,
    )
    if done.returncode and "mamx" in done.stderr:
        pytest.skip("this compiler does not know AMX")
    assert not done.returncode, done.stderr
    found = (tmp_path / "kernel.s").read_text()
    for instruction in ("ldtilecfg", "tileloadd", "tdpbusd", "tilestored", "tilerelease"):
        assert instruction in found, instruction
