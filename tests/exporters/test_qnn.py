"""The folders that QNN's converters and AI Hub take."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from optimum_mobilequant import quantize, set_backend
from optimum_mobilequant.exporters import export
from optimum_mobilequant.exporters.encodings import parse_encodings
from optimum_mobilequant.exporters.options import ENCODINGS_VERSIONS
from tests import tiny

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters import qnn  # noqa: E402

SIZES = {"context": 24, "prompt_length": 6}
PROMPT, TOKEN = "prompt_ar6_cl24", "token_ar1_cl24"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(variant, preset) -> folder of a saved checkpoint; each is made once."""
    cache = {}

    def make(variant="llama-gqa", preset="w8a8", **options):
        key = (variant, preset, str(options))
        if key not in cache:
            cache[key] = tmp_path_factory.mktemp("checkpoint")
            model = tiny.build(variant, num_hidden_layers=1)
            quantize(model, None, tiny.config(preset, **options)).save_pretrained(cache[key])
        return cache[key]

    return make


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """(variant, preset) -> result of the export; each is made once."""
    cache = {}

    def make(variant="llama-gqa", preset="w8a8", **options):
        key = (variant, preset, str(options))
        if key not in cache:
            out = tmp_path_factory.mktemp("exports") / "out"
            cache[key] = export(checkpoint(variant, preset, **options), "qnn", out, **SIZES)
        return cache[key]

    return make


def encodings_of(result, graph=PROMPT):
    return json.loads((result.path / f"{graph}.aimet" / qnn.ENCODINGS).read_text(encoding="utf-8"))


def test_the_folders_hold_what_ai_hub_takes_and_nothing_else(exported):
    result = exported()
    graphs = [result.path / f"{name}.aimet" for name in (PROMPT, TOKEN)]
    for folder in graphs:
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.data", "model.encodings"}
    beside = {path.name for path in result.path.iterdir()}
    assert beside == {*(path.name for path in graphs), "io_spec.json", "README.md", "export.json"}
    assert {p.relative_to(result.path).as_posix() for p in result.path.rglob("*") if p.is_file()} == set(result.files)
    hub = pytest.importorskip("qai_hub.client", reason="the client of AI Hub is not installed")
    for folder in graphs:
        assert hub._get_model_dir_type(str(folder)) == hub.SourceModelType.AIMET_ONNX


def test_this_packages_own_reader_takes_them(exported):
    from optimum_mobilequant.exporters.ai_hub.folders import read_folders

    result = exported()
    folders = read_folders(result.path)
    assert [folder.name for folder in folders] == [PROMPT, TOKEN]
    assert [t.name for t in folders[0].outputs] == ["logits", "past_key_0_out", "past_value_0_out"]


def test_both_graphs_have_their_own_copy_of_the_weights(exported):
    """ONNX refuses external data with several links."""
    first, second = (exported().path / f"{name}.aimet" / qnn.WEIGHTS for name in (PROMPT, TOKEN))
    assert first.read_bytes() == second.read_bytes()
    assert {file.stat().st_nlink for file in (first, second)} == {1}
    for file in (first, second):
        onnx.checker.check_model(str(file.with_name(qnn.MODEL)))


def test_the_graph_is_float_and_every_weight_is_a_value_of_its_integers(exported):
    result = exported("llama-gqa", "w4a8")
    path = result.path / f"{PROMPT}.aimet" / qnn.MODEL
    model = onnx.load(path)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph.node}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = [e for e in parse_encodings(encodings_of(result)) if e.is_param]
    assert {e.grid.bits for e in found} >= {4, 8, 16}
    for e in found:
        values, scale, zero = tensors[e.name], np.array(e.scale, np.float32), np.array(e.zero_point)
        codes = np.rint(values / scale) + zero  # channels are the last axis of (in, out)
        assert e.grid.qmin <= codes.min() and codes.max() <= e.grid.qmax, e.name
        np.testing.assert_allclose((codes - zero) * scale, values, rtol=2e-6, atol=0, err_msg=e.name)


def test_the_io_spec_says_which_integers_enter_and_leave(exported):
    result = exported()
    spec = json.loads((result.path / "io_spec.json").read_text(encoding="utf-8"))
    assert {key: spec[key] for key in ("format_version", "context", "prompt_length")} == {
        "format_version": 1,
        "context": 24,
        "prompt_length": 6,
    }
    for name, length in ((PROMPT, 6), (TOKEN, 1)):
        ports = {t["name"]: t for side in ("inputs", "outputs") for t in spec["graphs"][name][side]}
        assert ports["input_ids"] == {"name": "input_ids", "shape": [1, length], "dtype": "int32"}
        assert ports["attention_mask"]["dtype"] == "uint16"
        assert ports["attention_mask"]["zero_point"] == 65535
        assert ports["position_ids_cos"]["scale"] == 2.0**-14
        assert ports["position_ids_cos"]["zero_point"] == 32768
        assert ports["logits"]["shape"] == [1, length, tiny.VOCAB]
        assert ports["past_key_0_in"]["shape"] == [2, 1, 8, 24 - length]  # keys transposed
        assert ports["past_value_0_out"]["shape"] == [2, 1, length, 8]
        for part in ("key", "value"):
            inner, outer = ports[f"past_{part}_0_in"], ports[f"past_{part}_0_out"]
            assert inner["dtype"] == "uint8"
            assert [inner[k] for k in ("scale", "zero_point")] == [outer[k] for k in ("scale", "zero_point")]
        model = onnx.load(result.path / f"{name}.aimet" / qnn.MODEL, load_external_data=False)
        order = [v.name for v in (*model.graph.input, *model.graph.output)]
        assert list(ports) == order
        entries = {e["name"]: e for e in encodings_of(result, name)["activation_encodings"]}
        for port in ports.values():
            if "scale" in port:
                assert entries[port["name"]]["scale"] == [port["scale"]]
                assert entries[port["name"]]["offset"] == [-port["zero_point"]]


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_every_family_is_covered_and_both_graphs_have_the_same_encodings(exported, variant):
    result = exported(variant)
    for name in (PROMPT, TOKEN):
        found = result.summary["coverage"][name]
        assert found["integers"] == found["tensors"] > 60
        assert found["inherited"] > 10
    assert encodings_of(result, PROMPT) == encodings_of(result, TOKEN)


@pytest.mark.parametrize(("variant", "preset"), [("qwen2", "w8a8-full"), ("qwen3", "w4a8"), ("stablelm", "w8a8")])
def test_shifted_keys_are_covered(exported, variant, preset):
    result, plain = exported(variant, preset, key_shift=True), exported(variant, preset)
    key = "model.layers.0.self_attn.key_rotated"
    for name in (PROMPT, TOKEN):
        found, before = (r.summary["coverage"][name] for r in (result, plain))
        assert found["integers"] == found["tensors"] == before["tensors"] + 2  # the constant and what it is added to
        partial = ("model.layers.0.self_attn.query_rotated", f"{key}.rotated")  # some channels do not turn
        assert found["converts"] == (partial if variant == "stablelm" else ())
    entries = {e.name: e for e in parse_encodings(encodings_of(result))}
    shift, keys = entries["model.layers.0.self_attn.key_shift"], entries[key]
    assert shift.is_param and (shift.grid.bits, shift.zero_point) == (16, (2**15,))
    assert keys.grid.bits == 8 and entries["past_key_0_out"].same_codes(keys)
    assert entries[f"{key}.rotated"].grid.bits == 16
    assert encodings_of(result, PROMPT) == encodings_of(result, TOKEN)


@pytest.mark.parametrize("version", ENCODINGS_VERSIONS)
def test_the_version_is_the_one_asked_for(checkpoint, exported, tmp_path, version):
    result = export(checkpoint(), "qnn", tmp_path / "out", encodings_version=version, **SIZES)
    found = encodings_of(result)
    assert found["version"] == version
    like = {e.name: (e.scale, e.zero_point, e.grid) for e in parse_encodings(encodings_of(exported()))}
    assert {e.name: (e.scale, e.zero_point, e.grid) for e in parse_encodings(found)} == like
    assert f"AIMET layout {version}" in (result.path / "README.md").read_text(encoding="utf-8")


def test_tensors_that_htp_needs_wide_are_wide_and_listed(exported):
    result = exported()
    layer = "model.layers.0"
    assert result.summary["widened"] == [
        f"{layer}.input_layernorm.output",
        f"{layer}.self_attn.context",
        f"{layer}.mlp.down_proj.input",
    ]
    bits = {e.name: e.grid.bits for e in parse_encodings(encodings_of(result))}
    assert bits[f"{layer}.mlp.down_proj.input"] == 16
    assert bits[f"{layer}.mlp.gate_proj.output"] == 8
    assert "3 tensors of 8 bits have 16 here" in (result.path / "README.md").read_text(encoding="utf-8")
    assert exported("llama-gqa", "w8a16").summary["widened"] == []


def test_what_htp_cannot_run_is_refused_before_anything_is_written(checkpoint, tmp_path):
    with pytest.raises(ValueError, match='(?s)qnn_htp cannot run .*asymmetric.* use preset "w4a8"'):
        export(checkpoint("llama-gqa", "w4a8-asym"), "qnn", tmp_path / "out", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_an_uncovered_tensor_fails_the_export(checkpoint, tmp_path, monkeypatch):
    real = qnn.tensor_encodings
    monkeypatch.setattr(qnn, "tensor_encodings", lambda records: [e for e in real(records) if e.name != "logits"])
    with pytest.raises(ValueError, match="1 float tensors have no encoding: logits"):
        export(checkpoint(), "qnn", tmp_path / "out", **SIZES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_tampered_scale_fails_the_export(checkpoint, tmp_path, monkeypatch, value):
    real = qnn.open_checkpoint

    def tampered(folder):
        source = real(folder)
        source.graph.values["model.layers.0.mlp.up_proj.output"].encoding.scale.fill_(value)
        return source

    monkeypatch.setattr(qnn, "open_checkpoint", tampered)
    with pytest.raises(ValueError, match="mlp.up_proj.output: scale .* is not finite and above 0"):
        export(checkpoint(), "qnn", tmp_path / "out", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_the_float_graph_computes_what_the_model_computes_without_rounding(exported, checkpoint):
    ort = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    from transformers import AutoModelForCausalLM

    from optimum_mobilequant.nn.quantizer import Mode, quantizers_of

    result, model = exported("qwen2"), AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"))
    set_backend(model, "simulate")
    for quantizer in quantizers_of(model):
        if quantizer.spec.name != "model.embed_tokens.output":  # its grid is the table's
            quantizer.mode = Mode.OFF
    ids, past = torch.arange(3, 9)[None], 18
    session = ort.InferenceSession(
        str(result.path / f"{PROMPT}.aimet" / qnn.MODEL), providers=["CPUExecutionProvider"]
    )
    angles = torch.arange(6)[:, None] * model.model.rotary_emb.inv_freq
    mask = np.full((1, 1, 6, 24), -1e4, np.float32)
    mask[0, 0, :, past:] = np.triu(np.full((6, 6), -1e4, np.float32), 1)
    feeds = {
        "input_ids": ids.int().numpy(),
        "attention_mask": mask,
        "position_ids_cos": angles.cos()[None, None].numpy(),
        "position_ids_sin": angles.sin()[None, None].numpy(),
        "past_key_0_in": np.zeros((2, 1, 8, past), np.float32),
        "past_value_0_in": np.zeros((2, 1, past, 8), np.float32),
    }
    (logits,) = session.run(["logits"], feeds)
    torch.testing.assert_close(torch.from_numpy(logits), tiny.logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_weight_only_models_have_float_entries(tmp_path):
    pytest.importorskip("optimum.quanto")
    from optimum.quanto import QuantizedModelForCausalLM, qint8

    QuantizedModelForCausalLM.quantize(tiny.build("llama-gqa"), weights=qint8).save_pretrained(tmp_path / "quanto")
    result = export(tmp_path / "quanto", "qnn", tmp_path / "out", **SIZES)
    found = result.summary["coverage"][PROMPT]
    assert found["floats"] > 100 > found["integers"] > 10
    assert found["floats"] + found["integers"] == found["tensors"]
    data = encodings_of(result)
    activation = next(e for e in data["activation_encodings"] if e["name"] == "logits")
    assert activation == {"name": "logits", "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}
    weights = [e for e in data["param_encodings"] if e["name"].endswith("up_proj.weight")]
    assert [(e["bw"], e["is_sym"], e["enc_type"]) for e in weights] == [(8, True, "PER_CHANNEL")] * 2
    spec = json.loads(Path(result.path / "io_spec.json").read_text(encoding="utf-8"))
    assert spec["graphs"][PROMPT]["outputs"][0]["dtype"] == "float32"
