"""4-bit weights with groups, from the config to the saved file and the graph."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, inspect_checkpoint, quantize
from optimum_mobilequant.exporters import export
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.simulation import operation_differences, simulated_codes
from tests.tiny import build, config, logits_of, plan_of, probe_ids, token_ids

GROUPS = {"*_proj": {"weight_granularity": "group32"}}
DATA = {"dataset": token_ids(64), "samples": 48, "batch_size": 16}


def run(variant="llama-gqa", **options):
    options = {"recipe": "rtn", "overrides": GROUPS} | options
    return quantize(build(variant), None, config("w4a8", **DATA, **options))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups") / "model"
    model = run()
    model.save_pretrained(folder)
    return model, folder


def test_a_reloaded_model_is_the_same(saved):
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(model), logits_of(again))
    down = again.model.layers[0].mlp.down_proj.weight  # 48 columns: a group of 32 and one of 16
    assert down.multiplier.shape == (32, 2) and down.multiplier.dtype == torch.uint8
    assert torch.equal(down.codes[:, 32:], down.nibbles[:, 32:] * down.multiplier[:, 1:].to(torch.int8))
    assert int(down.multiplier.max()) == 16


def test_groups_are_closer_to_the_float_model():
    expected = logits_of(build("llama-gqa"))
    wide = {"*_proj": {"weight_granularity": "channel"}}
    errors = [(logits_of(run(overrides=o)) - expected).norm() for o in (GROUPS, wide)]
    assert errors[0] < errors[1]


def test_integers_alone_compute_it(saved):
    model, _ = saved
    executor = IntegerExecutor.of(model)
    found = operation_differences(executor, simulated_codes(model, executor, probe_ids()))
    assert found


def test_inspection_lists_the_steps_of_the_groups(saved):
    model, folder = saved
    name = "model.layers.0.mlp.down_proj.weight"
    row = next(row for row in inspect_checkpoint(folder).rows if row["tensor"] == name)
    held = model.model.layers[0].mlp.down_proj.weight
    steps = held.scale * held.multiplier
    assert row["bits"] == 4 and row["scale"] == pytest.approx([steps.min().item(), steps.max().item()])
    assert row["bytes"] == 16 * 48 + 32 * 4 + 64


@pytest.mark.parametrize("recipe", ["gptq", "qqq"])
def test_compensation_works_in_groups(recipe):
    record = run(recipe=recipe, effort="none", steps=None).config.quantization_config.recorded["rounding"]
    assert record["best"] < record["start"]


def test_training_and_learned_rounding_work_in_groups():
    options = {"recipe": "best", "steps": 6, "rounding_steps": 40, "lr_offsets": 0.03}
    recorded = run(**options).config.quantization_config.recorded
    assert recorded["rounding"]["best"] < recorded["rounding"]["start"] <= recorded["history"][0][1]


def test_what_was_validated_is_what_is_packed():
    """The packed model computes what the student computed, to float32's rounding."""
    from optimum_mobilequant import pipeline
    from optimum_mobilequant.run.prepare import prepare
    from optimum_mobilequant.tune import build_student

    options = {"recipe": "rtn", "overrides": GROUPS, "range_init": "mse", "clip_init": "mse"}
    model = build("llama-gqa")
    with prepare(model, None, config("w4a8", **DATA, **options), None) as job:
        student = build_student(model, job.plan)
        pipeline.transform(model, student, pipeline.calibrate(student, job), job)
        expected = logits_of(student)
    torch.testing.assert_close(logits_of(run(**options)), expected, rtol=1e-3, atol=1e-3)


def test_onnx_carries_them_as_8_bit_codes(saved, tmp_path):
    pytest.importorskip("onnx", reason="the ONNX export needs onnx")
    _, folder = saved
    result = export(folder, "onnx", tmp_path / "onnx", context=32, prompt_length=8)
    assert result.path.exists()


def test_damaged_multipliers_are_refused(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight._multiplier"
    tensors[key] = torch.full_like(tensors[key], 17)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="_multiplier in the checkpoint is not within 1 to 16"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_there_is_no_quanto_tensor_of_it(saved):
    with pytest.raises(ValueError, match="group32 has no quanto type"):
        saved[0].model.layers[0].mlp.down_proj.weight.as_quanto()


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("w8a8", GROUPS, "8-bit symmetric weights, but group32 is for 4 bits"),
        ("w4a8-asym", GROUPS, "4-bit asymmetric weights, but group32 is for 4 bits"),
        ("w4a8", {"lm_head": {"weight_granularity": "group32", "weight_bits": 4}}, "one scale a row"),
    ],
)
def test_what_has_no_groups_is_refused(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_of(build("llama-gqa"), preset, overrides)


def test_the_phone_target_refuses_groups_before_any_work():
    options = config("w4a8", overrides=GROUPS, target="qnn_htp")
    with pytest.raises(ValueError, match="one scale for each output channel"):
        quantize(build("llama-gqa"), None, options)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        MobileQuantConfig("w4a8", overrides={"*_proj": {"weight_granularity": "group100"}})
    assert MobileQuantConfig("w4a8-g128").resolve_scheme().weights["down"].group == 128
