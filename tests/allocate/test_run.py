"""``bits="auto:..."`` in a run: what is chosen, saved, resumed, exported and refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, inspect_checkpoint, quantize
from optimum_mobilequant.allocate import budget
from optimum_mobilequant.hf_quantizer import plan_of
from tests.tiny import build, config, logits_of
from tests.tiny import plan_of as plan_of_float


def bits_of(model):
    plan = plan_of(model, model.config.quantization_config)
    return {name: spec.rule.bits for name, spec in plan.weights.items() if name.endswith("_proj")}


@pytest.mark.parametrize("sensitivity", ["jaccard", "kl", "hessian"])
def test_a_mixed_model_is_saved_with_the_bytes_it_was_given(sensitivity, tmp_path):
    options = {"bits": "auto:24500B", "sensitivity": sensitivity, "bit_choices": [3, 4, 8], "prefix": [5, 6]}
    model = quantize(build("llama-bias", num_hidden_layers=3), None, config("w8a8", **options))
    saved, record = model.config.quantization_config, model.config.quantization_config.recorded["allocation"]
    assert saved.bits is saved.sensitivity is saved.bit_choices is None
    assert len(set(bits_of(model).values())) > 1
    model.save_pretrained(tmp_path / "mixed")
    found = inspect_checkpoint(tmp_path / "mixed")
    assert found.totals["bytes"] == record["projection_bytes"] + record["other_bytes"] <= 24500
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert torch.equal(logits_of(again), logits_of(model))
    assert bits_of(again) == bits_of(model)
    # The saved config is an ordinary one: it quantizes again without measuring anything.
    repeated = MobileQuantConfig.from_dict(saved.to_dict(), dataset=config().dataset, recorded={})
    assert torch.equal(logits_of(quantize(build("llama-bias", num_hidden_layers=3), None, repeated)), logits_of(model))


def test_more_budget_gives_more_bits_and_the_mean_is_kept():
    before = None
    for mean in (4, 5, 6.5, 8):
        model = quantize(build("llama"), None, config("w8a8", bits=f"auto:{mean}", sensitivity="hessian"))
        assert model.config.quantization_config.recorded["allocation"]["mean_bits"] <= mean
        bits = bits_of(model)
        assert before is None or all(bits[name] >= before[name] for name in bits)
        before = bits
    assert set(before.values()) == {8} and model.config.quantization_config.overrides is None


def test_what_the_user_overrides_beside_the_bits_goes_on_to_hold():
    overrides = {"model.layers.0.*": {"weight_symmetric": False}, "*.up_proj.output": {"bits": 16}}
    model = quantize(build("llama"), None, config("w4a8", bits="auto:6", overrides=overrides))
    plan = plan_of(model, model.config.quantization_config)
    assert plan.activations["model.layers.1.mlp.up_proj.output"].bits == 16
    assert not plan.weights["model.layers.0.mlp.up_proj"].rule.symmetric
    assert plan.weights["model.layers.1.mlp.up_proj"].rule.symmetric
    assert set(bits_of(model).values()) == {4, 8}


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    from optimum_mobilequant.run.run_dir import RunDirectory

    options = {"bits": "auto:6", "sensitivity": "kl", "batch_size": 2}
    expected = quantize(build("llama"), None, config("w8a8", **options))
    save = RunDirectory.save_progress

    def interrupt(self, stage, tensors, meta):
        save(self, stage, tensors, meta)
        if meta["done"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(build("llama"), None, config("w8a8", **options), run_dir=tmp_path / "run")
    monkeypatch.undo()
    resumed = quantize(build("llama"), None, config("w8a8", **options), run_dir=tmp_path / "run")
    records = [m.config.quantization_config.recorded["allocation"] for m in (expected, resumed)]
    assert records[0] == records[1]
    assert torch.equal(logits_of(resumed), logits_of(expected))
    assert (tmp_path / "run" / "05_allocate.safetensors").is_file()


def test_the_device_is_measured_once(tmp_path, monkeypatch):
    model = build("llama")
    plan = plan_of_float(model)
    working = budget.working_memory(model, plan)
    assert working > 64 * 2 * 2 * 32  # at least the KV cache of 64 positions, int8

    def free(bytes):
        monkeypatch.setattr(budget, "free_memory", lambda device: bytes + working)

    free(20_000)
    first = quantize(build("llama"), None, config("w8a8", bits="auto:device"), run_dir=tmp_path / "run")
    record = first.config.quantization_config.recorded["allocation"]
    assert record["projection_bytes"] + record["other_bytes"] <= 20_000 and record["mean_bits"] < 8
    free(10)
    again = quantize(build("llama"), None, config("w8a8", bits="auto:device"), run_dir=tmp_path / "run")
    assert bits_of(again) == bits_of(first)
    with pytest.raises(ValueError, match="this device has 10 bytes, the smallest model .* takes [0-9,]+ bytes"):
        quantize(build("llama"), None, config("w8a8", bits="auto:device"))
    assert budget.free_memory.__name__ == "<lambda>"
    monkeypatch.undo()
    assert budget.free_memory(torch.device("cpu")) > 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "auto:1000B"}, r'smallest model with bit_choices=\[4, 8\] takes ([0-9,]+) bytes \("auto:[0-9]+B"\)'),
        ({"bits": "auto:6", "overrides": {"*.down_proj": {"weight_bits": 8}}}, r'overrides\["\*.down_proj"\] fixes'),
        (
            {"bits": "auto:6", "bit_choices": [3, 4, 8], "target": "qnn_htp"},
            "3 bits, which the target refuses.* 4 or 8 bits",
        ),
        (
            {"bits": "auto:9", "bit_choices": [8, 16], "target": "qnn_htp"},
            "16 bits, which the target refuses.* 4 or 8 bits",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_long_work(options, message):
    with pytest.raises(ValueError, match=message.replace(".*", "(.|\n)*")):
        quantize(build("llama"), None, config("w8a8", **options))


def test_the_smallest_budget_that_the_error_names_works():
    import re

    with pytest.raises(ValueError) as caught:
        quantize(build("llama"), None, config("w8a8", bits="auto:1KB"))
    (size,) = re.findall(r'"(auto:[0-9]+B)"', str(caught.value))
    model = quantize(build("llama"), None, config("w8a8", bits=size))
    assert set(bits_of(model).values()) == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "4.5"}, "bits must be"),
        ({"bits": 4}, "bits must be a string"),
        ({"bits": "auto:3"}, 'the smallest is "auto:4", the largest "auto:8"'),
        ({"bits": "auto:9"}, 'the largest "auto:8"'),
        ({"sensitivity": "kl"}, "would have no effect"),
        ({"bit_choices": [4, 8]}, "would have no effect"),
        ({"bits": "auto:5", "sensitivity": "hesian"}, 'did you mean "hessian"'),
        ({"bits": "auto:5", "bit_choices": [5, 8]}, "bit_choices must be a list of two or more"),
        ({"bits": "auto:5", "bit_choices": [4]}, "bit_choices must be a list of two or more"),
        ({"bits": "auto:5", "bit_choices": [4, 4]}, "bit_choices must be a list of two or more"),
        ({"bits": "auto:3.5", "bit_choices": [3, 4]}, r"8-bit attention weights.* among bit_choices=\[3, 4\]"),
        ({"bits": "auto:5", "preset": "w8a8-paper"}, "one scale for a whole attention matrix"),
    ],
)
def test_contradictions_in_the_config_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MobileQuantConfig(**options)


@pytest.mark.parametrize("bits", [3, 16])
def test_exports_refuse_bits_they_have_no_type_for(bits, tmp_path):
    pytest.importorskip("onnx", reason="writing ONNX needs onnx")
    from optimum_mobilequant import export

    overrides = {"*.down_proj": {"weight_bits": bits}}
    quantize(build("llama"), None, config("w8a8", overrides=overrides)).save_pretrained(tmp_path / "odd")
    for target in ("onnx", "qnn", "compressed-tensors"):
        with pytest.raises(ValueError, match=f"down_proj.* {bits}-bit weights.*quantize again with 4 or 8 bits"):
            export(tmp_path / "odd", target, tmp_path / "out", context=16)
    assert not (tmp_path / "out").exists()


def test_a_mixed_model_exports_and_runs_alike(tmp_path):
    pytest.importorskip("onnxruntime", reason="running the export needs onnxruntime")
    from optimum_mobilequant import export
    from optimum_mobilequant.exporters.onnx.runtime import logits_runner
    from optimum_mobilequant.graph.executor import IntegerExecutor
    from tests.tiny import probe_ids

    model = quantize(build("llama"), None, config("w4a8", bits="auto:6"))
    model.save_pretrained(tmp_path / "mixed")
    export(tmp_path / "mixed", "onnx", tmp_path / "onnx", context=16, prompt_length=12)
    runner, ids = logits_runner(tmp_path / "onnx"), probe_ids(batch=1)
    integers = IntegerExecutor.of(model).forward(ids).logits
    difference = (torch.as_tensor(runner(ids)).long() - integers.long()).abs()
    assert (difference > 0).float().mean() < 0.2
