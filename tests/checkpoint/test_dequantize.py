"""``dequantize()``: back to a plain transformers model that holds the rounded weights."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import quantize, set_backend
from optimum_mobilequant.nn import Mode, QuantLinear, QuantNorm, set_mode
from tests.folding import decode, prefill, relative_error
from tests.tiny import VARIANTS, build, config, logits_of, probe_ids


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request, tmp_path_factory):
    """Tuned with transforms, so that the restored weights are the folded ones."""
    model = quantize(build(request.param), None, config("w8a8", recipe="mobilequant", steps=2))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(params=["memory", "disk"])
def pair(request, saved):
    """A quantized model and its restored twin, which was just quantized or comes from disk."""
    model, folder = saved
    twin = copy.deepcopy(model) if request.param == "memory" else AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), twin.dequantize()


def test_restored_weights_are_the_rounded_ones(pair):
    quantized, plain = pair
    offset = 1.0 if plain.config.model_type == "gemma" else 0.0
    for name, module in quantized.named_modules():
        if isinstance(module, QuantLinear | QuantNorm):
            weight = module._weight() if isinstance(module, QuantLinear) else module.weight
            values = weight() - (offset if isinstance(module, QuantNorm) else 0.0)
            assert torch.equal(plain.get_submodule(name).weight, values), name
            if module.bias is not None:
                assert torch.equal(plain.get_submodule(name).bias, module.bias), name
    assert torch.equal(plain.model.embed_tokens.weight, quantized.model.embed_tokens.weight())


def test_nothing_of_the_package_is_left(pair):
    _, plain = pair
    left = [n for n, m in plain.named_modules() if type(m).__module__.startswith("optimum_mobilequant")]
    assert left == []
    assert plain.state_dict().keys() == build_like(plain).state_dict().keys()
    hooks = [hook for module in plain.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if "mobilequant" in getattr(hook, "__module__", "")]
    assert getattr(plain.config, "quantization_config", None) is None


def build_like(model):
    return AutoModelForCausalLM.from_config(model.config)


def test_restored_model_computes_the_float_function_of_the_rounded_weights(pair):
    quantized, plain = pair
    set_backend(quantized, "simulate")
    set_mode(quantized, Mode.OFF)
    assert relative_error(prefill(plain, probe_ids()), prefill(quantized, probe_ids())) <= 2e-5
    assert relative_error(decode(plain, probe_ids()), decode(quantized, probe_ids())) <= 2e-5


def test_restored_model_saves_and_loads_as_a_float_model(pair, tmp_path):
    _, plain = pair
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded, "hf_quantizer") or loaded.hf_quantizer is None
    assert torch.equal(logits_of(loaded), logits_of(plain))
    tied = plain.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_restored_model_can_be_quantized_again(pair):
    _, plain = pair
    assert torch.isfinite(logits_of(quantize(plain, None, config("w4a8")))).all()
