"""Names and operators are stable: they are the module paths of the model, and the shapes are the mobile convention."""

import json
import re
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters.onnx import FLOAT, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.activations import ACTIVATIONS  # noqa: E402
from optimum_mobilequant.exporters.onnx.emit import NODE_SOURCE  # noqa: E402
from optimum_mobilequant.exporters.onnx.kinds import EMITTERS  # noqa: E402
from optimum_mobilequant.graph import KINDS  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402

GOLDEN = Path(__file__).with_name("layer_of_llama.txt")
# Parts that are no modules but tensors inside one.
INSIDE = re.compile(r"\.(scores|masked_scores|probabilities|context|context\.merged|attention_residual|heads|key_cache"
                    r"|value_cache|query_rotated|key_rotated|product)$")  # fmt: skip


def nodes_of(form_graph):
    return [f"{node.op_type} {node.output[0]}" for node in form_graph.node]


def test_one_layer_of_llama(tmp_path):
    with WeightStore(tmp_path / "model.data") as store:
        made = emit(saved.source().graph, Layout.fixed(4, 16), FLOAT, store, name="graph")
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*made.model.graph.value_info, *made.model.graph.output]
    }
    lines = [f"{node.op_type:<16} {node.output[0]} {shapes[node.output[0]]}" for node in made.model.graph.node]
    lines = [line for line in lines if "layers.1." not in line and "_1_" not in line]
    expected = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert lines == expected, "\n".join(lines)


@pytest.mark.parametrize(
    ("variant", "preset"),
    [(variant, "w8a8") for variant in ("llama-gqa", "llama-tied", "qwen2", "qwen3", "gemma", "stablelm")]
    + [("stablelm", "w8a8+shift")],
)
def test_every_name_leads_to_a_module(variant, preset):
    folder, model = saved.exported(variant, preset), saved.source(variant, preset).model
    modules = {name for name, _ in model.named_modules()}
    names = json.loads((folder / "names.json").read_text())
    border = {"attention_mask"} | {name for name in names if name.startswith(("past_", "position_ids_"))}
    for name, about in names.items():
        if name in border:
            continue
        owner = about["operation"]
        while INSIDE.search(owner):
            owner = INSIDE.sub("", owner)
        assert owner in modules, (name, about)
        if about["origin"] in ("plan", "constant"):
            assert about["tensor"] in saved.source(variant, preset).graph.values


def test_all_graphs_name_their_tensors_alike():
    found = []
    for name in ("prompt", "token"):
        graph = onnx.load(saved.exported("stablelm") / f"{name}.onnx", load_external_data=False).graph
        found.append((nodes_of(graph), [i.name for i in graph.input], [o.name for o in graph.output]))
    assert found[0] == found[1]
    nodes, inputs, outputs = found[0]
    assert inputs[:4] == ["input_ids", "attention_mask", "position_ids_cos", "position_ids_sin"]
    assert outputs[:3] == ["logits", "past_key_0_out", "past_value_0_out"]
    assert len({line.split(" ")[1] for line in nodes}) == len(nodes)


@pytest.mark.parametrize(("name", "new"), [("prompt", saved.PROMPT), ("token", 1)])
def test_shapes_at_the_border_are_the_mobile_convention(name, new):
    graph = onnx.load(saved.exported() / f"{name}.onnx", load_external_data=False).graph
    past, heads, size = saved.CONTEXT - new, 2, 8
    kinds = {3: "int8", 2: "uint8", 4: "uint16", 6: "int32"}
    ports = {
        v.name: (kinds[v.type.tensor_type.elem_type], [d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in [*graph.input, *graph.output]
    }
    assert ports["input_ids"] == ("int32", [1, new])
    assert ports["attention_mask"] == ("uint16", [1, 1, new, saved.CONTEXT])
    assert ports["position_ids_cos"] == ports["position_ids_sin"] == ("uint16", [1, 1, new, size // 2])
    assert ports["past_key_1_in"] == ("uint8", [heads, 1, size, past])
    assert ports["past_value_1_in"] == ("uint8", [heads, 1, past, size])
    assert ports["past_key_1_out"] == ("uint8", [heads, 1, size, new])
    assert ports["past_value_1_out"] == ("uint8", [heads, 1, new, size])
    assert ports["logits"] == ("uint16", [1, new, 96])
    assert len(ports) == 5 + 2 * 4


def test_no_head_is_repeated_and_a_norm_is_one_operator():
    graph = onnx.load(saved.exported("llama-mqa") / "prompt.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"Expand", "Tile", "ReduceMean", "Pow", "Sqrt"} & set(kinds)
    assert kinds.count("RMSNormalization") == 5 and kinds.count("Gather") == 1


def test_nodes_carry_the_operation_they_belong_to():
    graph = onnx.load(saved.exported() / "token.onnx", load_external_data=False).graph
    sources = {node.name: {p.key: p.value for p in node.metadata_props} for node in graph.node}
    assert sources["model.layers.1.mlp.act_fn.sigmoid"] == {NODE_SOURCE: "model.layers.1.mlp.act_fn"}
    assert sources["model.layers.1.mlp.down_proj.output"] == {NODE_SOURCE: "model.layers.1.mlp.down_proj"}


def test_every_kind_of_operation_has_an_emitter():
    assert set(EMITTERS) == set(KINDS)


def test_an_unknown_activation_function_is_refused_with_the_known_ones(tmp_path):
    import dataclasses

    graph = saved.source().graph
    ops = [
        dataclasses.replace(op, attributes={"function": "mish"}) if op.kind == "activation" else op for op in graph.ops
    ]
    with (
        WeightStore(tmp_path / "model.data") as store,
        pytest.raises(ValueError, match=r'activation "mish" \(model.layers.0.mlp.act_fn\).*silu'),
    ):
        emit(dataclasses.replace(graph, ops=ops), Layout.fixed(4, 16), FLOAT, store, name="graph")


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"swish"}))
def test_activation_functions_compute_what_transformers_does(name, tmp_path):
    import numpy as np
    import torch
    from onnx import TensorProto, helper
    from transformers.activations import ACT2FN

    from optimum_mobilequant.exporters.onnx.runtime import cpu_session
    from optimum_mobilequant.graph import Op

    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

    class Recorder:
        """The part of an emitter that an activation uses."""

        form, read = FLOAT, {"x": "x"}

        def __init__(self):
            self.nodes = []

        def encoding(self, value):
            return None

        def shape(self, value):
            return (1, 64)

        def inner(self, op, part, kind, inputs, like, shape, **attributes):
            self.nodes.append(helper.make_node(kind, inputs, [part], **attributes))
            return part

        def result(self, op, kind, inputs, **attributes):
            self.nodes.append(helper.make_node(kind, inputs, ["y"], **attributes))

    recorder = Recorder()
    ACTIVATIONS[name](recorder, Op("activation", "f", ("x",), "y", {"function": name}))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in ("x", "y")]
    graph = helper.make_graph(recorder.nodes, "g", ports[:1], ports[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "g.onnx"
    )
    x = np.linspace(-6, 6, 64, dtype=np.float32)[None]
    (found,) = cpu_session(tmp_path / "g.onnx").run(None, {"x": x})
    assert np.abs(found - ACT2FN[name](torch.from_numpy(x)).numpy()).max() <= 1e-6
