"""Every float tensor of a graph has an encoding, and tensors that hold the same data have the same one."""

from dataclasses import replace

import pytest

from optimum_mobilequant.exporters.encodings import TensorEncoding, check_coverage, tensor_encodings
from optimum_mobilequant.numerics import Grid

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")

from tests import tiny  # noqa: E402
from tests.exporters import fixed  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    found = fixed.small(tmp_path_factory.mktemp("graph"))
    return found.model, tensor_encodings(found.records)


def changed(encodings, name, **changes):
    assert name in {e.name for e in encodings}
    return [replace(e, **changes) if e.name == name else e for e in encodings]


def test_counts_of_a_tiny_graph(small):
    model, encodings = small
    found = check_coverage(model, encodings)
    assert found.tensors == found.integers == len(encodings)
    assert found.floats == 0
    assert found.converts == ()
    graph = model.graph
    by_hand = {v.name for v in graph.input} - {"input_ids"} | {o for n in graph.node for o in n.output}
    by_hand |= {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert by_hand == {e.name for e in encodings}
    moving = sum(n.op_type in ("Reshape", "Transpose", "Slice", "Concat", "Gather") for n in graph.node)
    assert found.inherited == moving > 10


def test_no_tensor_may_be_left_out(small):
    """Except one that holds moved data, which inherits; everything else is named."""
    model, encodings = small
    whole, inherited = check_coverage(model, encodings), 0
    for left_out in encodings:
        rest = [e for e in encodings if e is not left_out]
        try:
            found = check_coverage(model, rest)
        except ValueError as error:
            assert left_out.name in str(error)
            continue
        inherited += 1
        assert found.integers == whole.integers - 1
        assert found.tensors == whole.tensors
    assert 0 < inherited < whole.inherited + 1


def test_uncovered_tensors_are_counted_and_named(small):
    model, encodings = small
    names = ("model.layers.0.mlp.up_proj.output", "model.layers.0.mlp.up_proj.weight", "attention_mask")
    rest = [e for e in encodings if e.name not in names]
    with pytest.raises(ValueError, match="3 float tensors have no encoding: attention_mask, .*up_proj.output"):
        check_coverage(model, rest)


def test_entries_for_tensors_that_do_not_exist_are_refused(small):
    model, encodings = small
    with pytest.raises(ValueError, match="1 encodings name no float tensor of the graph: elsewhere"):
        check_coverage(model, [*encodings, replace(encodings[0], name="elsewhere")])


def test_constants_belong_among_the_parameters(small):
    model, encodings = small
    with pytest.raises(ValueError, match="section of parameters .*: logits"):
        check_coverage(model, changed(encodings, "logits", is_param=True))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.heads",  # Transpose
        "model.layers.0.self_attn.key_cache",  # Concat of old and new keys
        "model.layers.0.self_attn.query_rotated.first",  # Slice
        "model.embed_tokens.output",  # Gather
        "past_value_0_in",
    ],
)
@pytest.mark.parametrize("change", [{"zero_point": (3,)}, {"scale": (0.125,)}])
def test_data_movement_must_not_change_the_encoding(small, name, change):
    model, encodings = small
    with pytest.raises(ValueError, match="do not have the encoding of what they hold"):
        check_coverage(model, changed(encodings, name, **change))


def test_the_cache_that_leaves_must_fit_the_cache_that_enters():
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Relu", ["past_key_0_in"], ["y"]),
            onnx.helper.make_node("Relu", ["y"], ["past_key_0_out"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("past_key_0_in", onnx.TensorProto.FLOAT, (2,))],
        [onnx.helper.make_tensor_value_info("past_key_0_out", onnx.TensorProto.FLOAT, (2,))],
    )
    model = onnx.helper.make_model(graph)
    encodings = [TensorEncoding(n, (0.5,), (7,), Grid(8, False)) for n in ("past_key_0_in", "y", "past_key_0_out")]
    assert check_coverage(model, encodings).integers == 3  # y's type is inferred
    with pytest.raises(ValueError, match=r"past_key_0_out \(appended to past_key_0_in\)"):
        check_coverage(model, changed(encodings, "past_key_0_out", zero_point=(8,)))


def test_an_operator_of_unknown_type_is_refused():
    node = onnx.helper.make_node("Anything", ["x"], ["y"], domain="elsewhere")
    graph = onnx.helper.make_graph(
        [node, onnx.helper.make_node("Anything", ["y"], ["z"], domain="elsewhere")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2,))],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, (2,))],
    )
    with pytest.raises(ValueError, match="type of 1 tensors cannot be inferred: y"):
        check_coverage(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("elsewhere", 1)]), [])


@pytest.mark.parametrize("preset", ["w8a8", "w4a16", "w8a8-full", "w4a8-asym"])
@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_all_families_are_covered(variant, preset, tmp_path):
    found = fixed.emitted(fixed.graph(preset, variant, num_hidden_layers=1), tmp_path)
    rounded = {record.name for record in found.records.values() if record.origin == "plan"}
    coverage = check_coverage(found.model, tensor_encodings(found.records), rounded=rounded)
    assert coverage.integers == coverage.tensors > 60
    # The dims of a head that do not rotate are rounded to the rotation's grid with the others.
    partly = variant == "stablelm"
    assert [name.rpartition(".")[2] for name in coverage.converts] == ["query_rotated", "key_rotated"] * partly
