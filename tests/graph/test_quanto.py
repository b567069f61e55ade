"""Plain optimum-quanto models become graphs with quanto's own integers, and what cannot be said is refused."""

import functools
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from optimum.quanto import Calibration, HqqOptimizer, MaxOptimizer, QuantizedModelForCausalLM, freeze, quantize
from safetensors.torch import load_file, save_file

import optimum_mobilequant
from optimum_mobilequant.graph import load_graph, method_of
from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.runtime import simulated
from tests import tiny
from tests.graph import floating

WIDE = {"hidden_size": 256, "intermediate_size": 160, "head_dim": 64}  # rows of 256 and 160: blocks of 128 and 32
WHOLE_STEPS = functools.partial(MaxOptimizer(), zeropoint=True)
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@dataclass
class Saved:
    folder: Path
    logits: torch.Tensor
    weights: dict[str, torch.Tensor]  # what quanto dequantizes to


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(variant, weights, ...) -> a quanto model in a folder; each is made once."""
    cache = {}

    def make(variant, weights="qint8", optimizer=None, exclude=None, **changes):
        key = (variant, weights, optimizer, exclude, *changes.items())
        if key not in cache:
            made = QuantizedModelForCausalLM.quantize(
                tiny.build(variant, **changes), weights=weights, optimizer=optimizer, exclude=exclude
            )
            folder = tmp_path_factory.mktemp("quanto")
            made.save_pretrained(folder)
            dequantized = {
                f"{name}.weight": m.weight.dequantize().detach()
                for name, m in made._wrapped.named_modules()
                if hasattr(m, "weight_qtype")
            }
            cache[key] = Saved(folder, tiny.logits_of(made._wrapped), dequantized)
        return cache[key]

    return make


def weight_of(loaded, name):
    """Values of a matrix in the graph, the softmax scale taken out again."""
    values = floating.constant(loaded.graph, name)
    return values * loaded.plan.geometry.head_dim**0.5 if "q_proj" in name else values


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_the_graph_of_an_8_bit_model_computes_what_quanto_computes(saved, variant):
    quanto = saved(variant)
    loaded = load_graph(quanto.folder)
    assert loaded.method == "quanto"
    logits = floating.run(loaded.graph, loaded.model, loaded.plan, tiny.probe_ids())[loaded.graph.outputs[0]]
    torch.testing.assert_close(logits, quanto.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tiny.logits_of(loaded.model), quanto.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_only_the_matrices_have_encodings(saved, variant):
    loaded = load_graph(saved(variant).folder)
    for name, value in loaded.graph.values.items():
        is_matrix = value.role in ("attention", "gate", "up", "down", "head") and name.endswith(".weight")
        assert (value.encoding is not None) == is_matrix, name
        if name in loaded.graph.constants:
            stored = loaded.graph.constants[name]()
            assert tuple(stored.shape) == value.shape
            assert stored.dtype == (torch.int8 if is_matrix else torch.float32)


def test_8_bit_integers_and_scales_are_quantos(saved):
    quanto = saved("qwen2")
    stored = load_file(quanto.folder / "model.safetensors")
    graph = load_graph(quanto.folder).graph
    for name in quanto.weights:
        encoding = graph.values[name].encoding
        assert encoding.grid == Grid(8, signed=True) and encoding.per_channel and not encoding.zero_point.any()
        assert torch.equal(graph.constants[name](), stored[f"{name}._data"])
        factor = 8**-0.5 if "q_proj" in name else 1.0
        assert torch.equal(encoding.scale, stored[f"{name}._scale"].flatten() * factor)


@pytest.mark.parametrize(("changes", "blocks"), [(WIDE, {"q_proj": 128, "down_proj": 32}), ({}, {"q_proj": 0})])
def test_4_bit_integers_are_quantos_with_one_scale_a_block(saved, changes, blocks):
    quanto = saved("llama-gqa", "qint4", WHOLE_STEPS, **changes)
    loaded = load_graph(quanto.folder)
    for name, expected in quanto.weights.items():
        encoding = loaded.graph.values[name].encoding
        part = name.split(".")[-2]
        assert encoding.grid == Grid(4, signed=True)
        assert encoding.block_size == blocks.get(part, encoding.block_size)
        assert encoding.per_block == bool(changes)
        assert encoding.zero_point.any()
        torch.testing.assert_close(weight_of(loaded, name), expected, rtol=1e-6, atol=0)
        codes = loaded.graph.constants[name]()
        assert -8 <= codes.min() < codes.max() <= 7
    logits = floating.run(loaded.graph, loaded.model, loaded.plan, tiny.probe_ids())[loaded.graph.outputs[0]]
    torch.testing.assert_close(logits, quanto.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("optimizer", [None, HqqOptimizer()])
def test_float_shifts_are_encoded_anew_with_8_bits_and_said(saved, caplog, monkeypatch, optimizer):
    quanto = saved("llama-gqa", "qint4", optimizer, **WIDE)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load_graph(quanto.folder)
    assert "15 of 15 weights are quanto's 4 bits with a float shift" in caplog.text
    assert "zeropoint=True" in caplog.text
    for name, expected in quanto.weights.items():
        encoding = loaded.graph.values[name].encoding
        assert encoding.grid == Grid(8, signed=True) and encoding.per_channel and not encoding.zero_point.any()
        half = expected.abs().amax(1, keepdim=True) / 127 * 0.5
        assert ((weight_of(loaded, name) - expected).abs() <= half * 1.001).all()
    # The model that comes with the graph has quanto's exact values.
    torch.testing.assert_close(tiny.logits_of(loaded.model), quanto.logits, rtol=1e-4, atol=1e-4)


def test_rounding_the_shift_would_be_worse(saved):
    quanto = saved("llama-gqa", "qint4", **WIDE)
    stored, name = load_file(quanto.folder / "model.safetensors"), f"{DOWN}.weight"
    exact, scale = quanto.weights[name], stored[f"{name}._scale"]
    steps = stored[f"{name}._shift"] / scale
    to_whole_steps = ((steps - steps.round()) * scale).square().mean()
    to_8_bits = (weight_of(load_graph(quanto.folder), name) - exact).square().mean()
    assert to_8_bits < to_whole_steps / 20


def test_what_quanto_left_alone_stays_float(saved):
    quanto = saved("llama-tied", exclude="*.down_proj")
    graph = load_graph(quanto.folder).graph
    assert graph.values[f"{DOWN}.weight"].encoding is None
    assert torch.equal(
        graph.constants[f"{DOWN}.weight"](), load_file(quanto.folder / "model.safetensors")[f"{DOWN}.weight"]
    )


def test_a_tied_head_that_was_not_quantized_reads_the_embedding(saved):
    loaded = load_graph(saved("gemma", exclude="lm_head").folder)
    head = loaded.graph.constants["lm_head.weight"]()
    assert loaded.plan.geometry.tied and loaded.graph.values["lm_head.weight"].encoding is None
    torch.testing.assert_close(loaded.graph.constants["model.embed_tokens.table"](), head * 32**0.5)


def test_a_quantized_head_is_untied_even_if_the_config_does_not_say_so(saved, tmp_path):
    quanto = saved("llama-tied")
    folder = edited(quanto, tmp_path, config=lambda c: c.update(tie_word_embeddings=True))
    loaded = load_graph(folder)
    assert not loaded.plan.geometry.tied
    torch.testing.assert_close(weight_of(loaded, "lm_head.weight"), quanto.weights["lm_head.weight"])


def test_a_row_of_zeros_gets_a_positive_scale(tmp_path):
    model = tiny.build("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[5:8] = 0
    QuantizedModelForCausalLM.quantize(model, weights="qint8").save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight._scale"][5].any()
    graph = load_graph(tmp_path).graph
    assert (graph.values["lm_head.weight"].encoding.scale > 0).all()
    assert not floating.constant(graph, "lm_head.weight")[5:8].any()


def test_sharded_and_bfloat16_models_are_read(tmp_path):
    made = QuantizedModelForCausalLM.quantize(tiny.build("qwen2").to(torch.bfloat16), weights="qint8")
    made._wrapped.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(write_qmap(tmp_path, made._wrapped), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = load_graph(tmp_path)
    weight = made._wrapped.get_submodule(QUERY).weight
    expected = weight._data.float() * weight._scale.float()
    torch.testing.assert_close(weight_of(loaded, f"{QUERY}.weight"), expected, rtol=1e-6, atol=0)
    assert loaded.model.dtype == torch.float32


def write_qmap(folder, model):
    from optimum.quanto import quantization_map

    (folder / "made").mkdir()
    path = folder / "made" / "quanto_qmap.json"
    path.write_text(json.dumps(quantization_map(model)))
    return path


def edited(quanto, target, *, config=None, qmap=None, tensors=None):
    """A copy of a saved model with its files changed."""
    folder = shutil.copytree(quanto.folder, target / "copy")
    for name, change in (("config.json", config), ("quanto_qmap.json", qmap)):
        if change is not None:
            content = json.loads((folder / name).read_text())
            change(content)
            (folder / name).write_text(json.dumps(content))
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_quantized_activations_are_refused(tmp_path):
    model = tiny.build("llama-gqa")
    quantize(model, weights="qint8", activations="qint8")
    with Calibration(), torch.no_grad():
        model(tiny.probe_ids())
    freeze(model)
    QuantizedModelForCausalLM(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has qint8 activations: .* Quantize it with weights only"):
        load_graph(tmp_path)


@pytest.mark.parametrize("weights", ["qint2", "qfloat8"])
def test_other_weight_types_are_refused(tmp_path, weights):
    QuantizedModelForCausalLM.quantize(tiny.build("llama-gqa"), weights=weights).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has {weights}\S* weights; read are qint8 and qint4"):
        load_graph(tmp_path)


DAMAGED = {
    "missing": ({"tensors": lambda t: t.pop(f"{QUERY}.weight._scale")}, f"lacks 1 tensors, .* {QUERY}.weight._scale"),
    "unexpected": ({"tensors": lambda t: t.update(extra=torch.ones(1))}, "holds 1 tensors .* extra: save it again"),
    "shape": (
        {"tensors": lambda t: t.update({f"{QUERY}.weight._data": torch.ones(3, 2, dtype=torch.int8)})},
        f"{QUERY}.weight in the file does not fit a layer of 32 x 32",
    ),
    "float shape": (
        {"tensors": lambda t: t.update({"model.norm.weight": torch.ones(3)})},
        r"model.norm.weight is \[3\] in the file, but \[32\] by config.json",
    ),
    "not finite": (
        {"tensors": lambda t: t[f"{QUERY}.weight._scale"].fill_(torch.nan)},
        f"{QUERY}.weight in the file is not finite",
    ),
    "no layer": (
        {"qmap": lambda q: q.update({"model.nothing": {"weights": "qint8", "activations": "none"}})},
        "names model.nothing, no linear layers of this model",
    ),
    "bad map": ({"qmap": lambda q: q.update({"model.nothing": 3})}, "quanto_qmap.json is damaged"),
}


@pytest.mark.parametrize(("changes", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_models_are_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_graph(edited(saved("qwen2"), tmp_path, **changes))


def test_a_cut_file_is_refused(saved, tmp_path):
    folder = edited(saved("qwen2"), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_graph(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors"):
        load_graph(folder)


def test_own_checkpoints_are_loaded_by_the_same_call(tmp_path):
    model = optimum_mobilequant.quantize(tiny.build("llama-gqa"), None, tiny.config())
    model.save_pretrained(tmp_path)
    loaded = load_graph(tmp_path)
    assert loaded.method == method_of(tmp_path) == "mobilequant"
    with simulated(model):  # the graph comes with the simulation
        assert torch.equal(tiny.logits_of(loaded.model), tiny.logits_of(model))
    assert all(loaded.graph.values[name].encoding is not None for name in loaded.graph.constants)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_methods_are_named_and_refused(tmp_path, method):
    tiny.build("llama-gqa").config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"is quantized by '{method}': give a checkpoint that"):
        load_graph(tmp_path)


def test_float_models_missing_folders_and_broken_configs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_graph(tmp_path / "nowhere")
    tiny.build("llama-gqa").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a float model: give a checkpoint"):
        load_graph(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_graph(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "quanto"}}')
    with pytest.raises(ValueError, match="'quanto'.* needs the quanto_qmap.json"):
        load_graph(tmp_path)
