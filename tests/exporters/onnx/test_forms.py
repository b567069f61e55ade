"""The float, covered and dynamic forms of the same graph."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
ort = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from onnx import TensorProto, numpy_helper  # noqa: E402

from optimum_mobilequant.exporters.onnx import COVERED, FLOAT, REFERENCE, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import LogitsRunner, OnnxModel, cpu_session  # noqa: E402
from optimum_mobilequant.exporters.onnx.types import limits  # noqa: E402
from optimum_mobilequant.exporters.onnx.write import write_callers_files, write_graphs  # noqa: E402
from optimum_mobilequant.exporters.options import ExportOptions  # noqa: E402
from optimum_mobilequant.graph.inputs import DecoderInputs  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.tiny import probe_ids, token_ids  # noqa: E402

OPTIONS = ExportOptions(context=saved.CONTEXT, prompt_length=saved.PROMPT)
VARIANTS = [("llama-gqa", "w8a8"), ("qwen2", "w8a8-full"), ("qwen3", "w8a8"), ("gemma", "w8a16"), ("stablelm", "w8a8")]
VARIANTS += [("qwen2", "w8a8+shift"), ("qwen3", "w8a8-full+shift"), ("stablelm", "w8a8+shift")]
SHAPES = {"Reshape": 1, "Slice": 1, "Gather": 1}  # operators whose later inputs are no float tensors


def emitted(tmp_path, variant, preset, form, layout=None):
    with WeightStore(tmp_path / "model.data") as store:
        made = emit(saved.source(variant, preset).graph, layout or Layout.fixed(4, 16), form, store, name="graph")
    onnx.save(made.model, tmp_path / "graph.onnx")
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    return made


def runner(tmp_path, variant, preset, form):
    source = saved.source(variant, preset)
    write_callers_files(source, tmp_path, OPTIONS, write_graphs(source, tmp_path, OPTIONS, form))
    return LogitsRunner(OnnxModel(tmp_path))


@pytest.mark.parametrize(("variant", "preset"), VARIANTS)
def test_every_float_tensor_of_the_float_form_has_a_record_with_an_encoding(tmp_path, variant, preset):
    made = emitted(tmp_path, variant, preset, FLOAT)
    graph = made.model.graph
    floats = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {i.name for i in graph.initializer if i.data_type == TensorProto.FLOAT}
    floats |= {name for node in graph.node for name in node.output}
    assert floats == set(made.records)
    assert [name for name, record in made.records.items() if record.encoding is None] == []
    assert {node.op_type for node in graph.node} & {"QuantizeLinear", "DequantizeLinear"} == set()


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "preset"),
    [
        ("llama-gqa", "w8a8"),
        ("gemma", "w8a16"),
        ("stablelm", "w8a8"),
        ("qwen2", "w8a8+shift"),
        ("qwen3", "w8a8+shift"),
    ],
)
def test_the_float_form_computes_the_dequantized_model(tmp_path, variant, preset):
    import copy

    # seen in calibration: rows of the table that were not are clipped to the range of those that were
    ids = torch.tensor(token_ids()[:2])[:, :12]
    plain = copy.deepcopy(saved.source(variant, preset).model).dequantize()
    expected = plain(input_ids=ids, use_cache=False).logits
    found = runner(tmp_path, variant, preset, FLOAT)(ids)
    # left are the embedding, rounded to its 16-bit grid, and the int16 rotary tables
    assert ((found - expected).norm() / expected.norm()).item() <= 2e-3


@pytest.mark.parametrize(("variant", "preset"), VARIANTS)
def test_the_covered_form_rounds_every_tensor_and_stays_close(tmp_path, variant, preset):
    made = emitted(tmp_path, variant, preset, COVERED)
    producers = {node.output[0]: node for node in made.model.graph.node}
    readers = {}
    for node in made.model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    pairs = {"QuantizeLinear", "DequantizeLinear"}
    for node in made.model.graph.node:
        if node.op_type in pairs:
            continue
        floats = node.input[: SHAPES.get(node.op_type, len(node.input))]
        assert {producers[name].op_type for name in floats} == {"DequantizeLinear"}, node.name
        assert readers[node.output[0]] == ["QuantizeLinear"], node.name
    (tmp_path / "run").mkdir()
    ids = probe_ids(batch=4, length=20)
    found = runner(tmp_path / "run", variant, preset, COVERED)(ids)
    expected = saved.simulated_codes(variant, preset, ids)
    # derived grids round between the plan's: a code flips here and there, and more of them where all are 8-bit
    error = ((found - expected).float().norm() / (expected - expected.float().mean()).norm()).item()
    assert error <= (0.15 if preset.startswith("w8a8-full") else 0.08)


@pytest.mark.parametrize(("variant", "preset"), VARIANTS)
def test_the_covered_form_has_equal_bits_where_the_npu_wants_them(tmp_path, variant, preset):
    made = emitted(tmp_path, variant, preset, COVERED)
    kinds = {i.name: i.data_type for i in made.model.graph.initializer}
    nodes = {node.output[0]: node for node in made.model.graph.node}
    reader = {name: node for node in made.model.graph.node for name in node.input}
    seen = 0
    for node in made.model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1].endswith(".weight"):
            seen += 1
            bits = {kinds[nodes[node.input[0]].input[2]], kinds[reader[node.output[0]].input[2]]}
            assert len(bits) == 1, node.name
        if node.op_type == "LayerNormalization":
            bits = {kinds[nodes[node.input[0]].input[2]], kinds[reader[node.output[0]].input[2]]}
            assert bits == {TensorProto.UINT16}, node.name
    assert seen == 15


@pytest.mark.parametrize(
    ("variant", "preset"),
    [("llama-gqa", "w8a8"), ("stablelm", "w8a16"), ("stablelm", "w8a8+shift"), ("qwen3", "w8a8-full+shift")],
)
def test_derived_encodings_hold_the_values(tmp_path, variant, preset):
    made = emitted(tmp_path, variant, preset, REFERENCE)
    derived = {n: r for n, r in made.records.items() if r.origin == "derived" and r.encoding.scale.ndim == 0}
    assert len(derived) >= 10
    inferred = {value.name: value for value in made.model.graph.value_info}
    made.model.graph.output.extend(inferred[name] for name in derived)
    onnx.save(made.model, tmp_path / "all.onnx")
    feeds = feeds_of(saved.source(variant, preset), made, probe_ids(batch=1, length=4))
    found = cpu_session(tmp_path / "all.onnx").run(list(derived), feeds)
    for (name, record), values in zip(derived.items(), found, strict=True):
        low, high = limits(record.encoding)
        step = float(record.encoding.scale)
        if record.encoding.grid.bits == 16:
            assert low - step <= values.min() and values.max() <= high + step, name


def feeds_of(source, made, ids):
    """Inputs of a graph without past tokens: cached places are hidden."""
    cos, sin, visible = DecoderInputs(source.model)(ids)
    feeds = {}
    for value in made.model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros(shape, np.uint8)
    mask = np.zeros((1, 1, ids.shape[1], 16), np.uint16)
    mask[..., -ids.shape[1] :] = visible.numpy() * 65535
    feeds |= {"input_ids": ids.numpy().astype(np.int32), "attention_mask": mask}
    for part, codes in (("cos", cos), ("sin", sin)):
        feeds[f"position_ids_{part}"] = (codes.numpy().astype(np.int32) + 32768).astype(np.uint16)
    return feeds


@pytest.mark.parametrize(
    ("variant", "preset"),
    [(variant, "w8a8-full") for variant in ("llama-gqa", "qwen2", "stablelm")] + [("qwen2", "w8a8-full+shift")],
)
def test_the_dynamic_graph_takes_any_sizes(variant, preset):
    folder, source = saved.exported(variant, preset), saved.source(variant, preset)
    session = cpu_session(folder / "model_dynamic.onnx")
    shapes = {i.name: i.shape for i in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["attention_mask"][-1] == "total"
    assert shapes["past_key_0_in"][0] == "batch" and shapes["past_key_0_in"][2] == "past"
    names = [o.name for o in session.get_outputs()]
    past = {n: np.zeros([2, s[1], 0, s[3]], np.uint8) for n, s in shapes.items() if n.startswith("past_")}
    ids = probe_ids(batch=2, length=14)
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 14)):
        cos, sin, visible = DecoderInputs(source.model)(ids[:, start:end], past_length=start)
        feeds = {"input_ids": ids[:, start:end].numpy().astype(np.int32)}
        feeds["attention_mask"] = np.broadcast_to(visible.numpy() * 65535, (2, 1, end - start, end)).astype(np.uint16)
        for part, codes in (("cos", cos), ("sin", sin)):
            shifted = (codes.numpy().astype(np.int32) + 32768).astype(np.uint16)
            feeds[f"position_ids_{part}"] = np.ascontiguousarray(np.broadcast_to(shifted, (2, *shifted.shape[1:])))
        found = dict(zip(names, session.run(names, feeds | past), strict=True))
        parts.append(found["logits"])
        past = {n: np.concatenate([held, found[n.replace("_in", "_out")]], 2) for n, held in past.items()}
    codes = torch.from_numpy(np.concatenate(parts, 1).astype(np.int32))
    expected = saved.simulated_codes(variant, preset, ids)
    assert (codes == expected).float().mean() >= 0.99 and (codes.argmax(-1) == expected.argmax(-1)).all()


def test_a_mask_hides_whatever_the_score_is():
    """Hidden plus the highest score still lies below the lowest code of every layer's masked scores."""
    graph = saved.source("llama-gqa", "w8a8-full").graph
    from optimum_mobilequant.exporters.onnx.types import mask_encoding

    mask = mask_encoding(graph)
    assert limits(mask)[1] == 0.0 and limits(mask)[0] <= -50.0
    for op in graph.ops:
        if op.kind == "mask":
            low, high = limits(graph.values[op.output].encoding)
            assert high + limits(mask)[0] < low


def test_scales_of_the_file_are_the_checkpoints():
    made = onnx.load(saved.exported() / "token.onnx", load_external_data=False)
    model = saved.source().model
    found = {
        i.name: numpy_helper.to_array(i) for i in made.graph.initializer if i.name.endswith("mlp.up_proj.output.scale")
    }
    for name, scale in found.items():
        assert float(scale) == float(model.get_submodule(name.removesuffix(".scale")).scale)
    assert len(found) == 2
