"""Fused decoder layers compute, bit for bit, what the integer executor computes; so does everything around them."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from optimum_mobilequant import perplexity, quantize, set_backend
from optimum_mobilequant.graph import build as build_module
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.ir import Op
from optimum_mobilequant.kernels import cpp
from optimum_mobilequant.nn.shift import PackedShift
from optimum_mobilequant.plan import PRESETS
from optimum_mobilequant.runtime import backend_of, served, simulated
from tests.compiling import compiled
from tests.kernels.layers import library
from tests.tiny import FAMILIES, build, config, logits_of, probe_ids

pytestmark = pytest.mark.skipif(bool(cpp.available()), reason=f"compiled kernels: {cpp.available()}")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CASES = [(v, p) for v in FAMILIES for p in ("w8a8", "w4a8")] + [("llama-gqa", p) for p in PRESETS]
CASES += [("llama-bias", "w8a8"), ("llama-mqa", "w4a8-asym"), ("stablelm", "w8a16"), ("qwen3", "w8a8-full")]
SHIFT = {"key_shift": True}
# Of keys that get a constant: grouped heads, dimensions that do not rotate, norms over heads, keys of 16 bits before.
SHIFTED = [("llama-gqa", "w4a8"), ("stablelm", "w8a8"), ("qwen3", "w8a8"), ("qwen3", "w4a16"), ("stablelm", "w8a16")]


@pytest.fixture(scope="module")
def quantized():
    made = {}

    def get(variant="llama-gqa", preset="w8a8", **options):
        key = (variant, preset, str(options))
        if key not in made:
            made[key] = quantize(build(variant), None, config(preset, **options))
        return made[key]

    return get


def executed(model, ids):
    executor = IntegerExecutor.of(model)
    return executor.dequantize(executor.graph.outputs[0], executor.forward(ids).logits)


def with_random_shifts(model, seed=0):
    """A copy whose keys get other constants: of their size, different in each head, and two that saturate them."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, PackedShift):
            # 2**13 stands for half the range of what is rotated.
            module.codes.copy_(torch.randint(-(2**11), 2**11, module.codes.shape, generator=generator))
            module.codes[0, 1], module.codes[-1, -1] = -(2**15), 2**15 - 1
    set_backend(model, backend_of(model))
    return model


@torch.no_grad()
def key_steps(model, ids):
    """Steps by which the cached keys differ from the executor's, int32 ``[layers, batch, kv_heads, length, dims]``.

    Attention does not see a constant, so logits alone would show a wrong one by its rounding only.
    """
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    expected = torch.stack([key.int() for key, _ in IntegerExecutor.of(model).forward(ids).past])
    inside = (expected > 0) & (expected < 255)
    assert inside.float().mean() > 0.3 and not inside[:, :, 0, :, 1].any() and not inside[:, :, -1, :, -1].any()
    return torch.stack([layer.codes()[0].int() for layer in cache.layers]) - expected


def is_fused(model):
    return [layer.operator.endswith("fused") for layer in served(model)] == [True] * (len(served(model)) - 1) + [False]


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_logits_are_the_executors(quantized, variant, preset):
    model = quantized(variant, preset)
    assert backend_of(model) == "auto" and is_fused(model)
    assert torch.equal(logits_of(model), executed(model, probe_ids()))


@pytest.mark.parametrize(("variant", "preset"), SHIFTED)
def test_shifted_keys_are_the_executors(quantized, variant, preset):
    model = quantized(variant, preset, key_shift=True)
    assert is_fused(model) and torch.equal(logits_of(model), executed(model, probe_ids()))
    other = with_random_shifts(model)
    assert is_fused(other) and not key_steps(other, probe_ids()).any()
    found = logits_of(other)
    assert torch.equal(found, executed(other, probe_ids()))
    with simulated(other):
        expected = logits_of(other)
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("isa", library().instruction_sets if not cpp.available() else [])
@pytest.mark.parametrize(("preset", "options"), [("w4a8-asym", {}), ("w8a8", SHIFT), ("w4a16", SHIFT)])
def test_every_instruction_set(quantized, preset, options, isa, monkeypatch):
    model = quantized("llama-gqa", preset, **options)
    expected = executed(model, probe_ids())
    monkeypatch.setattr(cpp, "library", lambda: library(isa))
    assert torch.equal(logits_of(model), expected)
    if options:
        assert not key_steps(with_random_shifts(model), probe_ids()).any()


def test_a_changed_constant_changes_the_result(quantized):
    """The comparison above can fail."""
    model = copy.deepcopy(quantized())
    fields = library().layer_fields()
    numbers = model.model.layers[1].fused.constants[: 8 * len(fields)].view(torch.int64)
    numbers[fields.index("score_mantissa")] += 2**22
    assert not torch.equal(logits_of(model), executed(model, probe_ids()))


def test_a_graph_with_an_unknown_operation_is_not_fused(quantized, monkeypatch):
    model = copy.deepcopy(quantized())
    real = build_module.build_graph

    def longer(*args):
        graph = real(*args)
        graph.ops.append(Op("rotation", "x", (), "x"))
        return graph

    monkeypatch.setattr(build_module, "build_graph", longer)
    set_backend(model, "auto")
    assert not any("fused" in layer.operator for layer in served(model))
    assert logits_of(model).shape == (2, 12, 96)


@pytest.mark.parametrize("options", [{}, {"prefix": [1, 7, 9], "key_shift": True}], ids=["plain", "prefix"])
def test_every_way_to_generate_gives_the_executors_tokens(quantized, options):
    model, ids = quantized("qwen3", "w8a8", **options), probe_ids(length=6)
    expected = IntegerExecutor.of(model).generate(ids, 8)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    for kind in ("static", "dynamic"):
        found = model.generate(ids, cache_implementation=kind, disable_compile=True, **GREEDY)
        assert torch.equal(found, expected), kind
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], expected)


def test_a_cache_comes_by_either_name_and_by_no_other(quantized):
    model, ids = copy.deepcopy(quantized()), probe_ids(length=6)
    expected, name = model.generate(ids, **GREEDY), {}

    def renamed(layer, args, kwargs):
        held = kwargs.pop("cache" if "cache" in kwargs else "past_key_values")
        return args, kwargs | {name["now"]: held}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(renamed, with_kwargs=True)
    for name["now"] in ("past_key_values", "cache"):  # the second since transformers 5.24
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    name["now"] = "memory"
    with pytest.raises(RuntimeError, match="by another name .*'memory'"):
        model.generate(ids, **GREEDY)


def test_beams_reorder_the_cache(quantized):
    model, ids = copy.deepcopy(quantized()), probe_ids(length=6)
    found = model.generate(ids, num_beams=3, **GREEDY)
    with simulated(model):
        assert torch.equal(model.generate(ids, num_beams=3, **GREEDY), found)


@torch.no_grad()
def test_a_cache_is_one_byte_a_number_and_can_be_cropped(quantized):
    model, ids = quantize(build("llama-gqa", max_position_embeddings=128), None, config()), probe_ids(length=80)
    cache = DynamicCache(config=model.config)
    whole = model(ids, past_key_values=cache).logits
    layer = cache.layers[1]
    assert layer.keys.dtype == layer.values.dtype == torch.int8 and layer.keys.is_contiguous()
    assert cache.get_seq_length() == 80 and layer.capacity == 128
    executor = IntegerExecutor.of(model)
    for codes, expected in zip(layer.codes(), executor.forward(ids).past[1], strict=True):
        assert torch.equal(codes, expected)
    cache.crop(-30)
    again = model(ids[:, 50:], past_key_values=cache).logits
    assert cache.get_seq_length() == 80 and torch.equal(again, whole[:, 50:])
    place = layer.keys.data_ptr()
    model(ids[:, :8], past_key_values=cache)
    assert layer.keys.data_ptr() == place  # written in place


@torch.no_grad()
def test_caches_that_cannot_serve_are_refused(quantized):
    model, ids = copy.deepcopy(quantized()), probe_ids()
    cache = DynamicCache(config=model.config)
    with simulated(model):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="filled by another model or backend"):
        model(ids, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, and 1 are given"):
        model(ids[:1], past_key_values=cache)
    with simulated(model), pytest.raises(TypeError, match="start with a new cache"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="keep no attention probabilities"):
        model(ids, output_attentions=True)
    assert model(ids[:0]).logits.shape == (0, 12, 96) and model(ids[:, :0]).logits.shape == (2, 0, 96)
    for none in (ids[:0], ids[:, :0]):
        with simulated(model), pytest.raises(ValueError, match=rf"no tokens: the ids have shape \[{len(none)}, "):
            model(none)


@torch.no_grad()
def test_hidden_states_are_values_on_the_grids(quantized):
    model, ids = copy.deepcopy(quantized()), probe_ids()
    found = model(ids, output_hidden_states=True).hidden_states
    with simulated(model):
        expected = model(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def test_perplexity_is_that_of_the_simulation(quantized):
    model, texts = copy.deepcopy(quantized("llama-gqa", "w4a8")), probe_ids(1, 200)[0]
    assert is_fused(model)
    found = perplexity(model, None, texts, seq_len=24).perplexity
    set_backend(model, "simulate")
    assert found == pytest.approx(perplexity(model, None, texts, seq_len=24).perplexity, rel=2e-3)


def test_compiled_forward_gives_the_same_bits(quantized):
    model = copy.deepcopy(quantized())
    expected = logits_of(model)
    exported = torch.export.export(model, (), {"input_ids": probe_ids(), "use_cache": False}, strict=False).module()
    assert torch.equal(exported(input_ids=probe_ids(), use_cache=False).logits, expected)
    assert torch.equal(logits_of(compiled(model)), expected)


def test_a_copy_and_a_state_dict_take_the_integers_along(quantized, tmp_path):
    model = quantized("llama-tied", "w4a8")
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].fused.qkv.data_ptr() != model.model.layers[0].fused.qkv.data_ptr()
    assert torch.equal(logits_of(twin), logits_of(model))
    other = quantize(build("llama-tied", seed=1), None, config("w4a8"))
    assert not torch.equal(logits_of(other), logits_of(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(logits_of(loaded), logits_of(model).to(dtype))
