"""Decoder layers of torch's own operators, for machines without a compiler, against the integer executor."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from optimum_mobilequant import quantize, set_backend
from optimum_mobilequant.bench.runners import resident_bytes
from optimum_mobilequant.kernels import cpp, onednn, registry
from optimum_mobilequant.runtime import backend, served, simulated
from optimum_mobilequant.runtime.step_layer import StepLayer
from tests.compiling import compiled
from tests.runtime.test_fused import GREEDY, executed, key_steps, with_random_shifts
from tests.tiny import FAMILIES, build, config, logits_of, probe_ids

pytestmark = pytest.mark.skipif(bool(onednn.available()), reason=f"onednn: {onednn.available()}")
CASES = [(v, "w4a8") for v in FAMILIES] + [("llama-mqa", "w4a8-asym"), ("llama-bias", "w4a8")]
CASES += [("llama-gqa", "w8a8"), ("stablelm", "w8a8"), ("qwen3", "w8a8-full")]  # in planes without VNNI


@pytest.fixture(scope="module")
def quantized():
    made = {}

    def get(variant="llama-gqa", preset="w4a8", **options):
        key = (variant, preset, str(options))
        if key not in made:
            made[key] = quantize(build(variant), None, config(preset, backend="onednn", **options))
        return made[key]

    return get


@pytest.fixture
def said():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    backend.logger.addHandler(handler)
    yield found
    backend.logger.removeHandler(handler)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, StepLayer)]


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_logits_are_the_executors_but_for_single_steps(quantized, variant, preset):
    model = quantized(variant, preset)
    assert len(layers_of(model)) == 2
    assert {layer.operator.rpartition(" ")[2] for layer in served(model)[:-1]} == {"fused"}
    found, expected = logits_of(model), executed(model, probe_ids())
    # With 8 bits everywhere one step is a hundredth of a logit, and it is carried on.
    assert (found - expected).norm() < (5e-2 if preset == "w8a8-full" else 1e-3) * expected.norm()
    assert (found != expected).float().mean() < 0.05


def test_a_changed_table_changes_the_result(quantized):
    """The comparison above can fail."""
    model = copy.deepcopy(quantized())
    expected = executed(model, probe_ids())
    layers_of(model)[1].table.mul_(1.02)
    assert (logits_of(model) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("variant", ["llama-gqa", "stablelm", "qwen3"])
def test_shifted_keys_are_the_executors_but_for_single_steps(quantized, variant):
    model = with_random_shifts(quantized(variant, key_shift=True))
    assert len(layers_of(model)) == 2
    steps = key_steps(model, probe_ids())
    assert steps.abs().max() <= 1 and steps.count_nonzero() < 0.01 * steps.numel()
    found, expected = logits_of(model), executed(model, probe_ids())
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"prefix": [1, 7, 9], "key_shift": True}], ids=["plain", "prefix"])
def test_every_way_to_generate_gives_the_same_tokens(quantized, options):
    model, ids = quantized("qwen3", "w4a8", **options), probe_ids(length=6)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    for kind in ("static", "dynamic"):
        found = model.generate(ids, cache_implementation=kind, disable_compile=True, **GREEDY)
        assert torch.equal(found, expected), kind
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], expected)
    beams = model.generate(ids, num_beams=3, **GREEDY)
    twin = copy.deepcopy(model)
    with simulated(twin):
        assert torch.equal(twin.generate(ids, num_beams=3, **GREEDY), beams)


@torch.no_grad()
def test_the_cache_holds_the_executors_codes_in_a_byte_each(quantized):
    from optimum_mobilequant.graph.executor import IntegerExecutor

    model, ids = quantized(), probe_ids()
    cache = DynamicCache(config=model.config)
    whole = model(ids, past_key_values=cache).logits
    layer = cache.layers[1]
    assert layer.keys.dtype == layer.values.dtype == torch.int8 and layer.keys.shape[2] == layer.capacity == 64
    for codes, expected in zip(layer.codes(), IntegerExecutor.of(model).forward(ids).past[1], strict=True):
        assert int((codes.int() - expected.int()).abs().max()) <= 1
    cache.crop(-5)
    place = layer.keys.data_ptr()
    assert torch.equal(model(ids[:, -5:], past_key_values=cache).logits, whole[:, -5:])
    assert layer.keys.data_ptr() == place and cache.get_seq_length() == ids.shape[1]
    assert model(ids[:0]).logits.shape == (0, *whole.shape[1:]) and model(ids[:, :0]).logits.shape[:2] == (2, 0)


@pytest.mark.skipif(bool(cpp.available()), reason=f"compiled kernels: {cpp.available()}")
@torch.no_grad()
def test_a_cache_of_compiled_layers_is_refused(quantized):
    model, ids = copy.deepcopy(quantized()), probe_ids()
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    set_backend(model, "cpp")
    with pytest.raises(ValueError, match="filled by another backend; start with a new cache"):
        model(ids, past_key_values=cache)


def test_long_prompts_are_computed_some_rows_at_a_time(quantized, monkeypatch):
    from optimum_mobilequant.runtime import steps

    model = quantized()
    expected = logits_of(model)
    monkeypatch.setattr(steps, "_SCORES", 2 * 4 * 12 * 5)
    assert torch.equal(logits_of(model), expected)


def test_copies_state_dicts_and_files_keep_the_integers(quantized, tmp_path):
    model = quantized("llama-tied", "w4a8-asym")
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert layers_of(loaded) and torch.equal(logits_of(loaded), logits_of(model).bfloat16())
    set_backend(twin, "simulate")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[key]), key
    assert 0 < resident_bytes(model) <= model.get_memory_footprint() < 1.3 * resident_bytes(model)


def test_compiled_forward_gives_the_same_bits():
    model = quantize(build("llama-gqa", num_hidden_layers=1), None, config("w4a8", backend="onednn"))
    assert len(layers_of(model)) == 1
    expected = logits_of(model)
    assert torch.equal(logits_of(compiled(model)), expected)


def test_auto_takes_them_where_nothing_can_be_compiled(monkeypatch):
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "unavailable", lambda name: "no C++ compiler" if name == "cpp" else None)
    model = quantize(build("llama-gqa"), None, config("w4a8"))
    assert len(layers_of(model)) == 2
    assert served(model)[0].reasons == {"cpp": "no C++ compiler"}


@pytest.mark.parametrize(("preset", "reason"), [("w4a16", "16-bit codes"), ("w8a8-paper", "asymmetric 8-bit weights")])
def test_what_has_no_place_in_them_runs_as_single_kernels(preset, reason, said):
    model = quantize(build("llama-gqa"), None, config(preset, backend="onednn"))
    assert not layers_of(model) and any("not fused" in message and reason in message for message in said)
    assert torch.isfinite(logits_of(model)).all()


def test_processors_that_saturate_take_8_bit_weights_in_planes(monkeypatch):
    monkeypatch.setattr(onednn, "saturates", lambda: True)
    model = quantize(build("llama-gqa"), None, config("w8a8", backend="onednn"))
    assert len(layers_of(model)) == 2 and {layer.backend for layer in served(model)} == {"onednn"}
    expected, found = executed(model, probe_ids()), logits_of(model)
    assert (found - expected).norm() < 1e-2 * expected.norm()
