"""The covered form gives every operator equal bits: what an NPU computes with integers."""

import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters.onnx import COVERED, REFERENCE, Layout, WeightStore, emit  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402

MOVES = {"Reshape", "Transpose", "Slice", "Concat", "Gather"}
PAIR = {"QuantizeLinear", "DequantizeLinear"}
WIDTH = {onnx.TensorProto.UINT8: 8, onnx.TensorProto.UINT16: 16}
CASES = [("llama-gqa", "w8a8"), ("llama-gqa", "w8a16"), ("qwen2", "w4a8"), ("qwen3", "w8a8-full"), ("gemma", "w8a8"),
         ("stablelm", "w8a8"), ("stablelm", "w8a8-full"), ("qwen2", "w4a8+shift"), ("qwen3", "w8a8-full+shift"),
         ("stablelm", "w8a8+shift"), ("stablelm", "w8a8-full+shift")]  # fmt: skip


def emitted(variant, preset, form, folder):
    with WeightStore(folder / "model.data") as store:
        return emit(saved.source(variant, preset).graph, Layout.fixed(4, 12), form, store, name="graph").model.graph


def uneven(graph):
    """(node, bits of operands and result) of operators that mix bits, moved data included."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    found = []
    for node in graph.node:
        if node.op_type in PAIR:
            continue
        sources = [producer[name] for name in node.input if name in producer]
        operands = [s for s in sources if s.op_type == "DequantizeLinear" and s.input[0] not in types]
        result = readers[node.output[0]]
        assert result.op_type == "QuantizeLinear", node.name
        if node.op_type == "MatMul" and len(operands) == 2:
            assert WIDTH[types[operands.pop().input[2]]] == 8, node.name  # keys and values
        bits = [WIDTH[types[s.input[2]]] for s in [*operands, result]]
        if len(set(bits)) > 1:
            found.append((node.name, node.op_type, bits))
    return found


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_no_operator_mixes_bits(variant, preset, tmp_path):
    assert uneven(emitted(variant, preset, COVERED, tmp_path)) == []


def test_the_plan_itself_mixes_them():
    # so the test above has something to find
    from optimum_mobilequant.graph import Graph

    graph: Graph = saved.source("llama-gqa", "w8a8").graph
    norm = next(op for op in graph.ops if op.kind == "norm")
    assert {graph.values[name].encoding.grid.bits for name in (norm.inputs[0], norm.output)} == {8, 16}
    assert REFERENCE.converts is False


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_joined_and_moved_data_keep_one_grid(variant, preset, tmp_path):
    graph = emitted(variant, preset, COVERED, tmp_path)
    values = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.external_data
    }
    producer = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    seen = 0
    for node in graph.node:
        if node.op_type not in MOVES:
            continue
        pairs = [producer[name] for name in node.input if name in producer] + [readers[node.output[0]]]
        stated = {(float(values[pair.input[1]]), int(values[pair.input[2]])) for pair in pairs if pair.op_type in PAIR}
        assert len(stated) == 1, node.name
        seen += 1
    assert seen > 10
