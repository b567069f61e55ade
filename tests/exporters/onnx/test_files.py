"""The files of an export: one set of weights, protos without them, and offsets beyond 2 GiB."""

import json
import weakref

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from onnx import TensorProto, external_data_helper, numpy_helper  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from optimum_mobilequant.exporters.onnx import REFERENCE, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import cpu_session  # noqa: E402
from optimum_mobilequant.exporters.onnx.store import pack_nibbles  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.exporters.onnx.test_forms import feeds_of  # noqa: E402
from tests.tiny import probe_ids  # noqa: E402

GRAPHS = ("prompt", "token", "model_dynamic")


def places(path):
    """Initializer -> (offset, length) in the file of weights."""
    model = onnx.load(path, load_external_data=False)
    found = {}
    for proto in model.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            entry = {pair.key: pair.value for pair in proto.external_data}
            assert entry["location"] == "model.data"
            found[proto.name] = (int(entry["offset"]), int(entry["length"]))
    return found


def test_all_graphs_read_the_same_bytes_of_one_file():
    folder = saved.exported()
    prompt, token, dynamic = (places(folder / f"{name}.onnx") for name in GRAPHS)
    assert prompt == token == dynamic and len(prompt) >= 12
    assert sorted(p.name for p in folder.iterdir() if p.suffix in (".data", ".onnx")) == [
        "model.data", "model_dynamic.onnx", "prompt.onnx", "token.onnx",
    ]  # fmt: skip
    ends = sorted(prompt.values())
    assert all(a + length <= b for (a, length), (b, _) in zip(ends, ends[1:], strict=False))


def test_protos_hold_no_weights_and_pass_the_checker():
    for name in GRAPHS:
        path = saved.exported() / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert max(len(proto.raw_data) for proto in model.graph.initializer) < 1024
        assert model.opset_import[0].version == 23 and model.ir_version == 10


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_codes_in_the_file_are_the_checkpoints(preset):
    folder, model = saved.exported(preset=preset), saved.source(preset=preset).model
    proto = onnx.load(folder / "token.onnx")
    held = {i.name: i for i in proto.graph.initializer}
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"):
        weight = model.get_submodule(path).weight
        stored = numpy_helper.to_array(held[f"{path}.weight.codes"]).astype(np.int8)
        assert np.array_equal(stored, weight.codes.numpy().T)
        assert np.array_equal(numpy_helper.to_array(held[f"{path}.weight.scale"]), weight.scale.flatten().numpy())
    kind = TensorProto.INT4 if preset == "w4a8" else TensorProto.INT8
    assert held["model.layers.0.mlp.up_proj.weight.codes"].data_type == kind


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_nibbles_are_packed_as_onnx_reads_them(count):
    codes = np.array([-8, 7, -1, 3, 0, 5, -4, 1], np.int8)[:count]
    proto = TensorProto(name="x", data_type=TensorProto.INT4, dims=[count], raw_data=pack_nibbles(codes).tobytes())
    assert np.array_equal(numpy_helper.to_array(proto).astype(np.int8), codes)


def test_weights_beyond_two_gigabytes_load(tmp_path):
    """A hole at the front of the file puts every offset beyond what 32 bits hold; the disk stores no hole."""
    source = saved.source("llama-gqa", "w4a8")
    results = []
    for start in (0, 5 << 30):
        folder = tmp_path / str(start)
        folder.mkdir()
        with WeightStore(folder / "model.data") as store:
            store._file.seek(start)
            made = emit(source.graph, Layout.fixed(4, 16), REFERENCE, store, name="graph")
        onnx.save(made.model, folder / "graph.onnx")
        onnx.checker.check_model(str(folder / "graph.onnx"), full_check=True)
        assert min(offset for offset, _ in places(folder / "graph.onnx").values()) >= start
        feeds = feeds_of(source, made, probe_ids(batch=1, length=4))
        results.append(cpu_session(folder / "graph.onnx").run(["logits"], feeds)[0])
    assert (tmp_path / str(5 << 30) / "model.data").stat().st_size > 5 << 30
    assert np.array_equal(*results)


def test_weights_are_read_one_at_a_time(tmp_path, monkeypatch):
    """What makes a model larger than memory's remainder exportable: no two weights are held at once."""
    source, alive, most = saved.source(), weakref.WeakSet(), []

    def counted(read):
        def run():
            codes = read().clone()
            alive.add(codes)
            most.append(len(alive))
            return codes

        return run

    constants = {name: counted(read) for name, read in source.graph.constants.items()}
    monkeypatch.setattr(source.graph, "constants", constants)
    with WeightStore(tmp_path / "model.data") as store:
        emit(source.graph, Layout.fixed(4, 16), REFERENCE, store, name="graph")
        emit(source.graph, Layout.fixed(1, 16), REFERENCE, store, name="graph")
    assert len(most) == len(constants)  # the second graph reads none again
    assert max(most) <= 2


def test_rotary_tables_are_those_of_the_model():
    folder, model = saved.exported(), saved.source().model
    tables = load_file(folder / "rotary.safetensors")
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(saved.CONTEXT)[None])
    for name, table in (("cos", cos), ("sin", sin)):
        codes = torch.round(table[0, :, :4] * 2**14).numpy() + 32768
        assert tables[name].dtype == np.uint16 and np.array_equal(tables[name], codes)


def test_the_description_of_inputs_and_outputs_is_the_graphs_own():
    folder = saved.exported()
    about = json.loads((folder / "graphs.json").read_text())
    assert (about["context"], about["prompt_length"]) == (saved.CONTEXT, saved.PROMPT)
    for name in ("prompt", "token"):
        session = cpu_session(folder / about["graphs"][name]["file"])
        for ports, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            stated = about["graphs"][name][ports]
            assert [(n, p["shape"], f"tensor({p['type']})") for n, p in stated.items()] == [
                (v.name, v.shape, v.type) for v in found
            ]
    model = saved.source().model
    key = about["graphs"]["token"]["inputs"]["past_key_1_in"]
    quantizer = model.model.layers[1].self_attn.key_rotated
    assert (key["scale"], key["zero_point"]) == (float(quantizer.scale), int(quantizer.zero_point))


def test_external_data_is_found_by_onnx_itself():
    model = onnx.load(saved.exported() / "token.onnx")
    assert not any(external_data_helper.uses_external_data(i) for i in model.graph.initializer)
