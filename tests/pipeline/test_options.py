"""Options of the config have the effect that their documentation states."""

import pytest
import torch

from optimum_mobilequant import pipeline, quantize
from optimum_mobilequant.nn import QuantActivation
from optimum_mobilequant.nn.quantizer import quantizers_of
from optimum_mobilequant.run import prepare
from optimum_mobilequant.transform import stage as transform_stage
from tests.folding import relative_error
from tests.tiny import FAMILIES, build, config, logits_of, probe_ids, token_ids


def learned(variant="llama-gqa", preset="w4a8", **options):
    return quantize(build(variant), None, config(preset, recipe="mobilequant", **options))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("variant", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(variant, monkeypatch):
    runs = {}
    forward = QuantActivation.forward
    for option in (False, True):
        calls = []
        monkeypatch.setattr(QuantActivation, "forward", lambda self, x, c=calls: c.append(1) or forward(self, x))
        runs[option] = learned(variant, gradient_checkpointing=option), len(calls)
    (expected, plain), (result, checkpointed) = runs.values()
    assert checkpointed - plain == 4 * 2, "each of 4 steps should have recomputed 2 layers"
    assert same(result, expected)
    assert not result.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in result.modules())


def test_a_bfloat16_teacher_gives_nearly_the_same():
    start = {}
    for dtype in ("float32", "bfloat16"):
        start[dtype] = learned(teacher_dtype=dtype).config.quantization_config.recorded["loss"]["start"]
    assert start["float32"] != start["bfloat16"]
    assert start["bfloat16"] == pytest.approx(start["float32"], rel=0.1)


@pytest.mark.parametrize(
    ("recipe", "way"), [("best", 'recipe="mobilequant", which'), ("mobilequant", "a smaller batch_size")]
)
def test_a_lack_of_memory_is_told_with_a_way_out(monkeypatch, recipe, way):
    told = []
    monkeypatch.setattr(prepare.logger, "warning", told.append)
    steps = {"steps": 1, "rounding_steps": 1} if recipe == "best" else {"steps": 1}
    for free in (0, 2**40):  # unknown; plenty
        monkeypatch.setattr(prepare, "available_memory", lambda device, free=free: free)
        quantize(build("llama-gqa"), None, config(recipe=recipe, **steps))
    assert not any("GiB are free" in line for line in told)
    monkeypatch.setattr(prepare, "available_memory", lambda device: 2**10)
    quantize(build("llama-gqa"), None, config(recipe=recipe, **steps))
    assert any("GiB are free: " + way in line for line in told)


def test_block_wise_tuning_of_the_main_recipe(monkeypatch):
    choose = transform_stage.choose_ranges
    monkeypatch.setattr(
        transform_stage, "choose_ranges", lambda *a, **k: {n: (3 * x, 3 * y) for n, (x, y) in choose(*a, **k).items()}
    )
    model = learned(preset="w8a8", tuning="block-wise", steps=20, lr_ranges=0.1)
    loss = model.config.quantization_config.recorded["loss"]
    assert loss["objective"] == "hidden_mse"
    assert loss["best"] < 0.7 * loss["start"]


@pytest.mark.parametrize("transforms", [["norm_qkv"], ["q_k"], []])
def test_chosen_transforms_alone_exist(transforms, monkeypatch):
    seen = []
    transform = pipeline.transform
    monkeypatch.setattr(pipeline, "transform", lambda *a: seen.append(transform(*a)) or seen[-1])
    switches = {} if transforms else {"smooth_alpha": None}
    learned(transforms=transforms, **switches)
    assert {edge.site for edge in seen[0].edges} == set(transforms)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_range_methods(method):
    model = quantize(build("llama-gqa"), None, config(range_init=method))
    reference = logits_of(build("llama-gqa"))
    assert relative_error(logits_of(model), reference) < 0.6
    assert all(torch.isfinite(q.scale) for q in quantizers_of(model))


def test_range_methods_differ():
    scales = {}
    for method in ("minmax", "percentile", "mse"):
        model = quantize(build("llama-gqa"), None, config(range_init=method, dataset=token_ids(160), samples=64))
        scales[method] = torch.stack([q.scale for q in quantizers_of(model)])
    assert not torch.equal(scales["minmax"], scales["percentile"])
    assert not torch.equal(scales["minmax"], scales["mse"])
    assert (scales["mse"] <= scales["minmax"] * (1 + 1e-6)).all()


def test_overrides_reach_the_model():
    overrides = {"*.mlp.up_proj": {"weight_bits": 4, "weight_symmetric": False}, "*.up_proj.output": {"bits": 16}}
    model = quantize(build("llama-gqa"), None, config(overrides=overrides))
    up = model.model.layers[1].mlp.up_proj
    assert (up.weight.rule.bits, up.weight.rule.symmetric, up.output.spec.bits) == (4, False, 16)
    gate = model.model.layers[1].mlp.gate_proj
    assert (gate.weight.rule.bits, gate.output.spec.bits) == (8, 8)


def test_more_bits_are_nearer_to_the_float_model():
    reference = logits_of(build("llama-gqa"))
    error = {
        preset: float((logits_of(quantize(build("llama-gqa"), None, config(preset))) - reference).norm())
        for preset in ("w8a16", "w4a16", "w8a8", "w4a8", "w8a8-full")
    }
    assert error["w8a16"] < error["w8a8"] < error["w4a8"]
    assert error["w8a16"] < error["w4a16"] < error["w4a8"]
    assert error["w8a16"] < 0.1 * reference.norm()


def test_samples_and_length_bound_the_data():
    model = quantize(build("llama-gqa"), None, config(samples=4, seq_len=8))
    assert "4 training and 2 validation sequences of 8 tokens" in model.config.quantization_config.recorded["data"]
    long = quantize(build("llama-gqa"), None, config(samples=2, seq_len=500, dataset=[[5, 6, 7] * 200]))
    assert "sequences of 64 tokens" in long.config.quantization_config.recorded["data"]  # the model has 64 positions
    assert torch.isfinite(logits_of(long, probe_ids())).all()


@pytest.mark.parametrize(("free", "expected"), [(2**40, False), (2**10, True)])
def test_layers_are_recomputed_where_memory_is_short(free, expected, monkeypatch):
    seen = []
    student = pipeline.build_student
    monkeypatch.setattr("optimum_mobilequant.run.resources.available_memory", lambda device: free)
    monkeypatch.setattr(pipeline, "build_student", lambda *a, **k: seen.append(k["checkpointing"]) or student(*a, **k))
    learned(steps=1)
    assert seen == [expected]
