"""Every tensor of the decoder is rounded by a static quantizer before anything computes with it."""

import copy

import pytest
import torch
from torch import nn

from optimum_mobilequant import quantize
from optimum_mobilequant.nn.quantizer import Mode, quantize_output
from tests.tiny import FAMILIES, build, config, plan_of, probe_ids
from tests.tracking import tracking

PRESETS = ("w8a8", "w4a8-asym", "w8a8-full")


def violations_of(model, *, cached=False):
    ids = probe_ids()
    with tracking(model) as tracker:
        if cached:
            first = model(input_ids=ids[:, :6], use_cache=True)
            out = model(input_ids=ids[:, 6:7], past_key_values=first.past_key_values, use_cache=True)
        else:
            out = model(input_ids=ids, use_cache=False)
        if tracker.tag_of(out.logits).kind != "rounded":
            tracker.violations.append("the logits are raw")
    return tracker


@pytest.fixture(scope="module")
def quantized():
    made = {}

    def get(variant, preset="w8a8"):
        if (variant, preset) not in made:
            made[variant, preset] = quantize(build(variant), None, config(preset, backend="simulate"))
        return made[variant, preset]

    return get


@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_nothing_is_computed_from_unrounded_values(quantized, variant, preset, cached):
    model = quantized(variant, preset)
    tracker = violations_of(model, cached=cached)
    assert tracker.violations == []
    assert tracker.used == set(plan_of(build(variant), preset).activations)
    assert tracker.compute_ops > 40  # the check looked at something


def without(model, name):
    """A copy in which one quantizer does nothing."""
    broken = copy.deepcopy(model)
    owner, _, attribute = name.rpartition(".")
    module = broken.get_submodule(owner)
    if any(hook is quantize_output for hook in module._forward_hooks.values()):
        module._forward_hooks.clear()
    else:
        nothing = nn.Identity()
        nothing.mode = Mode.OFF  # the attention asks for it
        setattr(module, attribute, nothing)
    return broken


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma", "qwen3", "stablelm"])
def test_missing_any_one_quantizer_is_noticed(quantized, variant):
    """The check itself: for each quantizer of the plan, taking it away must give a violation."""
    model = quantized(variant)
    unnoticed = [
        name for name in plan_of(build(variant)).activations if not violations_of(without(model, name)).violations
    ]
    assert unnoticed == []


def test_values_off_the_grid_are_noticed(quantized):
    model = copy.deepcopy(quantized("llama"))
    norm = model.model.layers[0].input_layernorm
    norm.output.register_forward_hook(lambda module, args, out: out.add_(module.scale * 0.3))
    assert any("off the grid of model.layers.0.input_layernorm.output" in v for v in violations_of(model).violations)


def test_a_float_operation_slipped_into_a_layer_is_noticed(quantized):
    model = copy.deepcopy(quantized("llama"))
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_hook(lambda module, args, out: torch.tanh(out))
    assert any("add reads a raw tensor" in v for v in violations_of(model).violations)
