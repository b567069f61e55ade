"""Bias correction removes the mean error of each channel, where a bias can be."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import pipeline, quantize
from optimum_mobilequant.families import family_of
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.tune import correctable
from optimum_mobilequant.tune import stage as tune_stage
from tests.tiny import build, config, logits_of, token_ids

ALL = ("query", "key", "value", "out", "gate", "up", "down")
CAN = {
    "llama-gqa": ALL,
    "llama-bias": ALL,
    "qwen2": ("query", "key", "value"),
    "qwen3": ("query", "key", "value", "out"),
    "gemma": ("query", "key", "value", "out"),
    "stablelm": ("query", "key", "value"),
}


@pytest.mark.parametrize("variant", CAN)
def test_which_projections_can_be_corrected(variant):
    model = build(variant)
    assert correctable(model, family_of(model)) == CAN[variant]


def test_refused_where_no_bias_can_be(monkeypatch):
    monkeypatch.setattr(pipeline, "calibrate", lambda *a: pytest.fail("the run had begun"))
    with pytest.raises(ValueError, match="no projection of mistral has a bias.*leave it out"):
        quantize(build("mistral"), None, config(bias_correction=True))


@pytest.fixture
def corrected(monkeypatch):
    """The student between correction and packing."""
    seen = []
    fold = pipeline.fold_and_round

    def spy(student, job):
        seen.append((student, job))
        return fold(student, job)

    monkeypatch.setattr(pipeline, "fold_and_round", spy)
    monkeypatch.setattr(tune_stage, "withdraw", lambda *a: None)  # whatever the objective says
    return seen


def mean_errors(student, job, parts):
    """Mean error of each output channel of layer 0, rounded against float, relative to the output's size."""
    found = {}
    f = job.plan.family

    def watch(path, mode):
        def keep(module, args):
            found.setdefault((path, mode), []).append(args[0].flatten(0, -2))

        return keep

    hooks = []
    for mode in (Mode.OFF, Mode.QUANTIZE):
        for part in parts:
            path = f.layer(0, getattr(f, part))
            hooks.append(student.get_submodule(path).output.register_forward_pre_hook(watch(path, mode)))
        set_mode(student, mode)
        for ids in job.data.train.split(4):
            student(input_ids=ids, use_cache=False)
        while hooks:
            hooks.pop().remove()
    errors = {}
    for part in parts:
        path = f.layer(0, getattr(f, part))
        exact, rounded = (torch.cat(found[path, mode]) for mode in (Mode.OFF, Mode.QUANTIZE))
        errors[part] = float((rounded - exact).mean(0).norm() / exact.norm(dim=0).norm() * len(exact) ** 0.5)
    return errors


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-bias", "stablelm"])
def test_mean_errors_vanish(variant, corrected):
    parts = CAN[variant]
    for option in (False, True):
        quantize(build(variant), None, config("w4a8", bias_correction=option))
    before, after = (mean_errors(student, job, parts) for student, job in corrected)
    for part in parts:
        assert before[part] > 1e-3, part
        assert after[part] < 0.05 * before[part], part


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "gemma", "stablelm", "qwen2"])
def test_added_biases_save_and_load(variant, corrected, tmp_path):
    model = quantize(build(variant), None, config("w4a8", bias_correction=True))
    f = family_of(build(variant))
    layer = model.get_submodule(f.layer(0))
    for part in ALL:
        has = layer.get_submodule(getattr(f, part)).bias is not None
        assert has is (part in CAN[variant]), part
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    floats = reloaded.dequantize()
    added = floats.get_submodule(f.layer(0)).get_submodule(f.query).bias
    assert added is not None
    assert added.any()


def test_a_correction_that_raises_the_objective_is_withdrawn(monkeypatch):
    worse = tune_stage.bias_corrections

    def spoiled(student, *args):
        changes = worse(student, *args)
        tune_stage.correct(student, {path: change + 5.0 for path, change in changes.items()})
        return changes

    monkeypatch.setattr(tune_stage, "bias_corrections", spoiled)
    model = quantize(build("llama-gqa"), None, config("w4a8", bias_correction=True))
    plain = quantize(build("llama-gqa"), None, config("w4a8"))
    result = model.config.quantization_config.recorded["bias_correction"]
    assert result["corrected"] > result["start"]
    assert result["kept"] is False
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits_of(model), logits_of(plain))
    assert not model.config.attention_bias


def test_a_kept_correction_lowers_the_objective():
    model = quantize(
        build("llama-bias"), None, config("w4a8", bias_correction=True, samples=16, dataset=token_ids(48))
    )
    result = model.config.quantization_config.recorded["bias_correction"]
    assert result["kept"] is (result["corrected"] < result["start"])


def test_resumes_behind_the_correction(tmp_path, monkeypatch, corrected):
    options = {"bias_correction": True, "recipe": "mobilequant", "effort": "none", "steps": None}
    expected = quantize(build("llama-gqa"), None, config("w4a8", **options))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fold_and_round", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(build("llama-gqa"), None, config("w4a8", **options), run_dir=str(tmp_path))
    monkeypatch.setattr(tune_stage, "bias_corrections", lambda *a: pytest.fail("computed again"))
    resumed = quantize(build("llama-gqa"), None, config("w4a8", **options), run_dir=str(tmp_path))
    assert torch.equal(logits_of(resumed), logits_of(expected))
