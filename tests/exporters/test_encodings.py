"""Encodings files: signs and layouts of the three versions, what is read back, what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mobilequant.exporters.encodings import (
    TensorEncoding,
    encodings_dict,
    parse_encodings,
    tensor_encodings,
    validate,
    write_encodings,
)
from optimum_mobilequant.exporters.options import ENCODINGS_VERSIONS
from optimum_mobilequant.graph import Encoding
from optimum_mobilequant.numerics import Grid

pytest.importorskip("onnx", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters.onnx import Record  # noqa: E402
from tests.exporters import fixed  # noqa: E402

U8, U16, S4, S8, S32 = Grid(8, False), Grid(16, False), Grid(4, True), Grid(8, True), Grid(32, True)
ACTIVATION = TensorEncoding("a", (0.5,), (130,), U8)
WEIGHT = TensorEncoding("w", (0.25, 0.5), (0, 0), S4, axis=1, is_param=True)
BLOCKS = TensorEncoding("b", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (0,) * 6, S4, 0, 16, 3, is_param=True)  # 2 channels of 3
FLOAT = TensorEncoding("f", (), (), None)


def core(encodings):
    """What every version says about a tensor."""
    return {e.name: (e.scale, e.zero_point, e.grid, e.block_size) for e in encodings}


def entries(version, *encodings):
    data = encodings_dict(encodings, version)
    assert data["version"] == version
    return data["encodings"] if version == "2.0.0" else (data["activation_encodings"], data["param_encodings"])


def test_signs_and_keys_of_1_0_0():
    activations, params = entries("1.0.0", ACTIVATION, WEIGHT, replace(ACTIVATION, name="z", grid=U16))
    fixed_part = {"enc_type": "PER_TENSOR", "dtype": "INT", "bw": 8, "is_sym": False}
    assert activations[0] == {"name": "a", **fixed_part, "scale": [0.5], "offset": [-130]}
    assert params == [
        {
            "name": "w",
            "enc_type": "PER_CHANNEL",
            "dtype": "INT",
            "bw": 4,
            "is_sym": True,
            "scale": [0.25, 0.5],
            "offset": [-8, -8],
        }
    ]


@pytest.mark.parametrize(
    ("grid", "zero_point", "offset"), [(S8, 0, -128), (S4, 0, -8), (U16, 65535, -65535), (U8, 0, 0)]
)
def test_offsets_count_from_the_lowest_code(grid, zero_point, offset):
    activations, _ = entries("1.0.0", TensorEncoding("t", (1.0,), (zero_point,), grid))
    assert activations[0]["offset"] == [offset]
    older, _ = entries("0.6.1", TensorEncoding("t", (1.0,), (zero_point,), grid))
    assert older["t"][0]["offset"] == offset


def test_0_6_1_has_an_entry_for_each_channel_and_strings_for_booleans():
    activations, params = entries("0.6.1", ACTIVATION, WEIGHT)
    assert activations["a"] == [
        {
            "bitwidth": 8,
            "dtype": "int",
            "is_symmetric": "False",
            "min": -65.0,
            "max": 62.5,
            "scale": 0.5,
            "offset": -130,
        }
    ]
    assert [row["is_symmetric"] for row in params["w"]] == ["True", "True"]
    assert [(row["min"], row["max"]) for row in params["w"]] == [(-2.0, 1.75), (-4.0, 3.5)]


def test_2_0_0_has_onnx_signs_and_leaves_zero_out():
    found = entries("2.0.0", ACTIVATION, WEIGHT)
    assert found == [
        {"name": "a", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 130},
        {"name": "w", "output_dtype": "int4", "y_scale": [0.25, 0.5], "axis": 1},
    ]


def test_blocks_lie_channel_by_channel_in_1_0_0_and_in_the_tensors_shape_in_2_0_0():
    _, params = entries("1.0.0", BLOCKS)
    assert params[0]["enc_type"] == "PER_BLOCK"
    assert params[0]["block_size"] == 16
    assert params[0]["scale"] == [1, 2, 3, 4, 5, 6]
    (entry,) = entries("2.0.0", BLOCKS)
    assert entry["y_scale"] == [[1, 4], [2, 5], [3, 6]]  # (blocks of inputs, outputs)
    assert (entry["axis"], entry["block_size"]) == (0, 16)
    (entry,) = entries("2.0.0", replace(BLOCKS, axis=1))
    assert entry["y_scale"] == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="0.6.1 have no form for blocks .* use version 1.0.0"):
        encodings_dict([BLOCKS], "0.6.1")


def test_floats_are_stated_where_the_version_can():
    assert entries("1.0.0", FLOAT)[0] == [{"name": "f", "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}]
    assert entries("0.6.1", FLOAT)[0] == {"f": [{"bitwidth": 16, "dtype": "float"}]}
    assert entries("2.0.0", FLOAT) == []
    assert parse_encodings(encodings_dict([FLOAT], "1.0.0")) == [FLOAT]


def test_the_defaults_of_the_file_are_the_most_frequent_bits():
    data = encodings_dict([ACTIVATION, replace(ACTIVATION, name="b", grid=U16), replace(ACTIVATION, name="c"), WEIGHT])
    assert data["quantizer_args"]["activation_bitwidth"] == 8
    assert data["quantizer_args"]["param_bitwidth"] == 4
    assert data["quantizer_args"]["per_channel_quantization"] is True


grids = st.sampled_from([U8, U16, S4, S8, S32, Grid(4, False)])
scales = st.floats(2.0**-40, 2.0**20, width=32)


@st.composite
def tensor(draw, name):
    grid, kind = draw(grids), draw(st.sampled_from(["tensor", "channel", "float"]))
    if kind == "float":
        return TensorEncoding(name, (), (), None)
    count = 1 if kind == "tensor" else draw(st.integers(2, 5))
    points = st.integers(grid.qmin, grid.qmax)
    scale, zeros = (draw(st.lists(s, min_size=count, max_size=count)) for s in (scales, points))
    return TensorEncoding(
        name, tuple(scale), tuple(zeros), grid, 0 if count > 1 else None, is_param=draw(st.booleans())
    )


@given(st.tuples(tensor("a"), tensor("b"), tensor("c")))
def test_every_version_is_read_back(found):
    for version in ENCODINGS_VERSIONS:
        read = parse_encodings(json.loads(json.dumps(encodings_dict(found, version))))
        if version == "2.0.0":
            assert core(read) == core(e for e in found if e.grid is not None)
            assert {e.name: e.axis for e in read} == {e.name: e.axis for e in found if e.grid is not None}
        else:
            assert core(read) == core(found)
            assert {e.name: e.is_param for e in read} == {e.name: e.is_param for e in found}


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_read_back(axis):
    for version in ("1.0.0", "2.0.0"):
        assert core(parse_encodings(encodings_dict([replace(BLOCKS, axis=axis)], version))) == core([BLOCKS])


@pytest.mark.parametrize("version", ENCODINGS_VERSIONS)
def test_a_tiny_models_file_is_the_golden_one(version, tmp_path):
    found = tensor_encodings(fixed.small(tmp_path).records)
    write_encodings(found, tmp_path / "file", version)
    golden = (fixed.GOLDEN / f"{version}.encodings").read_text(encoding="utf-8")
    assert (tmp_path / "file").read_text(encoding="utf-8") == golden, "python -m tests.exporters.fixed writes it again"
    assert core(parse_encodings(json.loads(golden))) == core(found)
    named = [line for line in golden.splitlines() if line.startswith("  ") and '"name": "' in line]
    assert len(named) == (0 if version == "0.6.1" else len(found))  # one line for each tensor


def test_asymmetric_signed_weights_become_unsigned_with_equal_values():
    zero_point = torch.tensor([-3, 2], dtype=torch.int32)
    record = Record("w", Encoding(torch.tensor([0.5, 1.0]), zero_point, S4), 1, "constant", "w")
    (found,) = tensor_encodings({"w": record})
    assert found.grid == Grid(4, False)
    assert found.zero_point == (5, 10)
    assert found.is_param
    symmetric = replace(record, encoding=Encoding(torch.tensor([0.5, 1.0]), torch.zeros(2, dtype=torch.int32), S4))
    assert tensor_encodings({"w": symmetric})[0].grid == S4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.0,)}, "a: scale 0.0 is not finite and above 0"),
        ({"scale": (-1.0,)}, "a: scale -1.0"),
        ({"scale": (math.nan,)}, "a: scale nan"),
        ({"scale": (math.inf,)}, "a: scale inf"),
        ({"zero_point": (256,)}, r"a: zero point 256 is not in \[0, 255\]"),
        ({"zero_point": (-(2**40),)}, "a: zero point -1099511627776"),
        ({"zero_point": (1, 2)}, "a: 1 scales with 2 zero points"),
        ({"scale": (), "zero_point": ()}, "a: 0 scales"),
        ({"grid": Grid(64, False)}, "a: 64 bits"),
    ],
)
def test_damaged_encodings_are_named_and_not_written(change, message, tmp_path):
    damaged = [WEIGHT, replace(ACTIVATION, **change)]
    with pytest.raises(ValueError, match=message):
        validate(damaged)
    for version in ENCODINGS_VERSIONS:
        with pytest.raises(ValueError, match=message):
            write_encodings(damaged, tmp_path / "file", version)
    assert not (tmp_path / "file").exists()


def test_two_entries_for_one_tensor_are_refused():
    with pytest.raises(ValueError, match="a has 2 entries"):
        encodings_dict([ACTIVATION, replace(ACTIVATION, is_param=True)])


@pytest.mark.parametrize(
    ("version", "tamper", "message"),
    [
        ("1.0.0", lambda d: d.pop("param_encodings"), "layout of version 1.0.0 .*param_encodings"),
        ("1.0.0", lambda d: d["activation_encodings"][0].pop("scale"), "layout of version 1.0.0 .*scale"),
        (
            "1.0.0",
            lambda d: d["activation_encodings"][0].update(offset=[-1.5]),
            "offset -1.5 of a is not a whole number",
        ),
        ("1.0.0", lambda d: d["activation_encodings"][0].update(offset=[1]), r"zero point -1 is not in \[0, 255\]"),
        ("1.0.0", lambda d: d["activation_encodings"][0].update(scale=[0]), "scale 0.0 is not finite and above 0"),
        ("1.0.0", lambda d: d["activation_encodings"][0].update(enc_type="LPBQ"), "type LPBQ, which is not read"),
        ("1.0.0", lambda d: d.update(version="2.0.0"), "layout of version 2.0.0"),
        ("1.0.0", lambda d: d.update(version="0.5"), "version '0.5' is unknown; known: 1.0.0, 0.6.1, 2.0.0"),
        ("1.0.0", lambda d: d.pop("version"), "version None is unknown"),
        ("0.6.1", lambda d: d["activation_encodings"].update(a=[]), "layout of version 0.6.1"),
        ("0.6.1", lambda d: d["activation_encodings"]["a"][0].update(is_symmetric=True), "layout of version 0.6.1"),
        ("2.0.0", lambda d: d["encodings"][0].update(output_dtype="float8e4m3fn"), "type float8e4m3fn"),
        ("2.0.0", lambda d: d["encodings"][0].update(y_zero_point=999), r"zero point 999 is not in \[0, 255\]"),
        ("2.0.0", lambda d: d["encodings"].append(d["encodings"][0]), "a has 2 entries"),
    ],
)
def test_files_that_are_not_what_they_say_are_refused(version, tamper, message):
    data = json.loads(json.dumps(encodings_dict([ACTIVATION, WEIGHT], version)))
    parse_encodings(data)
    tamper(data)
    with pytest.raises(ValueError, match=message):
        parse_encodings(data)


def test_2_0_0_needs_the_axis_of_channels():
    with pytest.raises(ValueError, match="axis of w, which is not known"):
        encodings_dict([replace(WEIGHT, axis=None)], "2.0.0")
