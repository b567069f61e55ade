"""Storage formats in a model: saved and read alike, tuned as stored, refused by everything that needs integers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, inspect_checkpoint, quantize
from optimum_mobilequant.exporters.targets import TARGETS, check_plan
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.hf_quantizer import plan_of
from optimum_mobilequant.nn.formats import FORMATS, FormatWeight, TunableFormat
from optimum_mobilequant.plan import WeightRule, WeightSpec
from optimum_mobilequant.tune.parameters import adaptive_lasso_clip
from tests.tiny import build, config, logits_of

CASES = {
    "e0m4": {"weight_format": "e0m4", "weight_group": 32},
    "adpq": {"weight_format": "adpq", "outlier_share": 0.05},
    "adpq, 3 bits": {"weight_format": "adpq", "overrides": {"*_proj": {"weight_bits": 3}}},
    "some integers": {
        "weight_format": "adpq", "overrides": {"*.down_proj": {"weight_format": "int", "weight_bits": 8}},
    },
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("variant", ["llama-bias", "llama-tied"])
def test_a_checkpoint_computes_what_was_quantized(variant, options, tmp_path):
    model = quantize(build(variant), None, config("w4a8", **options))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))
    assert isinstance(again.model.layers[0].self_attn.q_proj.weight, FormatWeight)
    found = inspect_checkpoint(tmp_path / "saved")
    row = next(row for row in found.rows if row["tensor"] == "model.layers.0.mlp.up_proj.weight")
    assert options["weight_format"] in row["role"] and row["scale"] is None and row["bytes"] > 0
    assert "up_proj" in found.table()
    plain = again.dequantize()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, weight())
    with pytest.raises(ValueError, match='_proj.* are stored as .*a format for CPU and GPU.*weight_format="int"'):
        IntegerExecutor.of(model)


@pytest.mark.parametrize("name", ["e0m4", "adpq"])
def test_exports_and_targets_refuse_it(name, tmp_path):
    pytest.importorskip("onnx", reason="writing ONNX needs onnx")
    from optimum_mobilequant import export

    refused = f'stored as {name}, a format for CPU and GPU that no .* export computes with.*weight_format="int"'
    quantize(build("llama"), None, config("w4a8", weight_format=name)).save_pretrained(tmp_path / "saved")
    for target in ("onnx", "qnn", "compressed-tensors"):
        with pytest.raises(ValueError, match=refused):
            export(tmp_path / "saved", target, tmp_path / "out", context=16)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=refused):
        quantize(build("llama"), None, config("w4a8", weight_format=name, target="qnn_htp"))
    model = build("llama")
    check_plan(
        model, plan_of(model, MobileQuantConfig("w4a8", recipe="adpq")), TARGETS["qnn_htp"]
    )  # the recipe keeps integers


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_tuned_is_what_is_stored(name):
    """No transforms: nothing is rescaled between the student's weight and the checkpoint's, so they are equal."""
    options = {"recipe": "mobilequant", "steps": 3, "weight_format": name, "clip_init": "mse", "transforms": []}
    float_model = build("llama")
    rule = plan_of(float_model, MobileQuantConfig("w4a8", weight_format=name)).weights["model.layers.0.mlp.up_proj"]
    tuned = TunableFormat(float_model.model.layers[0].mlp.up_proj.weight.detach().clone(), rule)
    tuned.search = True
    model = quantize(float_model, None, config("w4a8", **options))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight(), tuned())
    tuned.search, tuned._kept = False, None
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight(), tuned())
    loss = model.config.quantization_config.recorded["loss"]
    assert loss["best"] <= loss["start"]


def test_gradients_pass_straight_through_to_the_transforms():
    from torch import nn

    from optimum_mobilequant.nn.tunable import LogScale

    source = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    rule = WeightRule(4, format="e0m4", span=32)
    weight = TunableFormat(source, WeightSpec("w", "up", rule))
    assert weight().data_ptr() == weight().data_ptr()  # nothing to recompute without transforms
    theta = nn.Parameter(torch.zeros(40))
    weight.columns_log.append(LogScale(theta, 1, None))
    factor = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    (weight() * factor).sum().backward()
    assert torch.allclose(theta.grad, (factor * source).sum(0), atol=1e-5)
    with torch.no_grad():
        theta.add_(0.3)
    encoded = FormatWeight(weight.tensors(), source.shape, rule)
    assert torch.allclose(encoded(), weight().detach(), atol=1e-6)
    assert torch.equal(encoded.rows(torch.tensor([[3, 1]])), encoded()[torch.tensor([[3, 1]])])
    assert encoded.to(torch.bfloat16)._scale.dtype == torch.float32
    with pytest.raises(RuntimeError, match="no integer codes"):
        weight.codes()


def test_damaged_numbers_are_found(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    quantize(build("llama"), None, config("w4a8", weight_format="adpq")).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    tensors["model.layers.1.mlp.up_proj.weight._low"][0] = torch.nan
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="up_proj.weight._low in the checkpoint is not finite"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="up_proj.weight._low in the checkpoint is not finite"):
        inspect_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_format": "e0m5"}, 'did you mean "e0m4"'),
        ({"weight_format": "e0m4", "preset": "w8a8"}, "e0m4 has 4 bits, not 8"),
        ({"weight_format": "e0m4", "preset": "w4a8", "weight_group": 48}, "weight_group must be 32, 64 or 128"),
        ({"weight_group": 32}, "weight_group=32 would have no effect"),
        ({"weight_format": "e0m4", "preset": "w4a8", "outlier_share": 0.1}, "outlier_share=0.1 would have no effect"),
        ({"weight_format": "adpq", "preset": "w4a8", "bits": "auto:4.5"}, "leave one out"),
        ({"weight_format": "adpq", "preset": "w4a8", "learn_clips": True}, "learn_clips=True would have no effect"),
        ({"weight_format": "adpq", "preset": "w4a8", "clip_init": "adpq"}, 'clip_init="adpq" would have no effect'),
        ({"weight_format": "adpq", "preset": "w4a8", "recipe": "best"}, "rounds to nearest"),
        ({"weight_format": "adpq", "preset": "w4a8", "recipe": "gptq"}, "rounds to nearest"),
        ({"weight_format": "adpq", "preset": "w4a8", "outlier_share": 0.5}, r"a number in \[0, 0.2\]"),
        ({"overrides": {"*": {"weight_format": "adpq"}}}, "must be one of"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MobileQuantConfig(**options)


def test_an_override_of_the_bits_alone_is_refused():
    overrides = {"*.down_proj": {"weight_bits": 8}}
    with pytest.raises(ValueError, match='down_proj: the weight format e0m4 has 4 bits.*"weight_format": "int"'):
        quantize(build("llama"), None, config("w4a8", weight_format="e0m4", overrides=overrides))


def test_a_config_with_a_format_survives_json_and_a_new_format_replaces_it():
    first = MobileQuantConfig("w4a8", weight_format="adpq", outlier_share=0.05)
    saved = first.to_dict()
    assert saved["scheme"]["weights"]["up"] == {
        "bits": 4, "symmetric": True, "granularity": "channel", "format": "adpq", "span": 128, "outliers": 0.05,
    }  # fmt: skip
    assert "format" not in saved["scheme"]["weights"]["head"]
    assert MobileQuantConfig.from_dict(saved) == first
    changed = MobileQuantConfig.from_dict(saved, weight_format="int", outlier_share=None)
    assert changed.resolve_scheme() == MobileQuantConfig("w4a8").resolve_scheme()


@pytest.mark.parametrize("rule", [WeightRule(4), WeightRule(4, symmetric=False), WeightRule(8, granularity="tensor")])
def test_the_clip_of_adpq_is_one_of_its_quantiles_and_lowers_the_error(rule):
    from torch import nn

    from optimum_mobilequant.nn.tunable import TunableWeight
    from optimum_mobilequant.numerics import dequantize

    noise = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 400, generator=noise) * (1 + 4 * torch.rand(8, 400, generator=noise) ** 30)
    spec = WeightSpec("w", "up", rule)
    errors = []
    for clip in (None, adaptive_lasso_clip(matrix, spec)):
        weight = TunableWeight(matrix, spec)
        weight.clip = None if clip is None else nn.Parameter(clip)
        errors.append((dequantize(*weight.codes()) - matrix).abs().pow(2.4).mean().item())
    assert errors[1] < errors[0] * (0.95 if rule.bits == 4 else 1.0001)
