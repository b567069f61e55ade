"""Ranges searched by the error of each layer's output."""

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.nn.capture import layer_inputs, run_layer
from optimum_mobilequant.transform import stage as transform_stage
from optimum_mobilequant.tune.objective import normalised_mse
from tests.tiny import build, config, logits_of


@pytest.fixture
def searched(monkeypatch):
    """(student, job, start ranges, found ranges) of every search."""
    seen = []
    search = transform_stage.search_ranges

    def spy(student, ranges, job):
        seen.append((student, job, ranges, search(student, ranges, job)))
        return seen[-1][-1]

    monkeypatch.setattr(transform_stage, "search_ranges", spy)
    return seen


def output_error(student, job, ranges):
    """Error of the first layer's output; its input is exact up to the embedding's rounding."""
    from optimum_mobilequant.nn import quantizers_of
    from optimum_mobilequant.numerics import affine_qparams

    for quantizer in quantizers_of(student):
        if quantizer.spec.name in ranges:
            quantizer.set(*affine_qparams(*ranges[quantizer.spec.name], quantizer.spec.grid))
    layer, batches = student.get_submodule(job.plan.family.layer(0)), job.data.train[:8].split(4)
    set_mode(student, Mode.OFF)
    inputs, options = layer_inputs(student, layer, batches)
    target = run_layer(layer, inputs, options)
    set_mode(student, Mode.QUANTIZE)
    inputs, _ = layer_inputs(student, layer, batches)
    outputs = run_layer(layer, inputs, options)
    return sum(float(normalised_mse(a, b)) for a, b in zip(outputs, target, strict=True))


@pytest.mark.parametrize("variant", ["llama-gqa", "stablelm"])
def test_the_layers_output_gets_nearer(variant, searched):
    quantize(build(variant), None, config("w8a8", range_init="output"))
    ((student, job, start, found),) = searched
    with torch.no_grad():
        before, after = output_error(student, job, start), output_error(student, job, found)
    assert after < 0.99 * before
    changed = {name for name in found if found[name] != start[name]}
    assert changed
    for name in changed:
        spec = job.plan.activations[name]
        assert spec.bits == 8
        assert spec.fixed is None
        assert spec.role != "scores"
        assert found[name][0] <= 0 <= found[name][1]


def test_learned_ranges_start_from_the_search(searched):
    model = quantize(build("llama-gqa"), None, config("w8a8", recipe="mobilequant", range_init="output"))
    assert len(searched) == 1
    assert torch.isfinite(logits_of(model)).all()


def test_a_repeated_run_loads_the_search(tmp_path, monkeypatch):
    run = {"run_dir": str(tmp_path)}
    first = quantize(build("llama-gqa"), None, config("w8a8", range_init="output"), **run)
    (tmp_path / "40_pack.safetensors").unlink()
    monkeypatch.setattr(transform_stage, "least_output_error", lambda *a: pytest.fail("searched again"))
    again = quantize(build("llama-gqa"), None, config("w8a8", range_init="output"), **run)
    assert torch.equal(logits_of(again), logits_of(first))
