"""The prefix in the cache computes what its tokens in front of the text compute."""

import copy

import pytest
import torch
from transformers import StaticCache

from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.nn.prefix import (
    logits_behind,
    prefix_codes,
    prefix_length,
    prefix_states,
    prepend,
)
from optimum_mobilequant.transform import edges_of
from optimum_mobilequant.tune import Learnables, build_student
from tests.folding import Float64, decode, prefill, relative_error
from tests.prefix.fixture import PREFIX, quantized
from tests.tiny import FAMILIES, build, logits_of, plan_of, probe_ids

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def student_of(model, states):
    """A student with random transforms at all sites, nothing rounded."""
    plan = plan_of(model)
    plan = type(plan)(**{**vars(plan), "prefix": tuple(PREFIX)})
    student = build_student(model, plan, states)
    edges = edges_of(plan.family, plan.geometry, ("norm_qkv", "norm_mlp", "up_down", "v_o", "q_k"))
    generator = torch.Generator().manual_seed(3)
    scales = {e.name: 0.5 * torch.randn(e.size, generator=generator) for e in edges}
    Learnables(student, plan, edges, scales)
    set_mode(student, Mode.OFF)
    return student


@pytest.mark.parametrize("variant", [*FAMILIES, "llama-mqa", "llama-bias"])
@torch.no_grad()
def test_a_cached_prefix_equals_its_tokens_in_front(variant):
    model = build(variant)
    student = student_of(model, prefix_states(model, PREFIX))
    expected = logits_behind(model, PREFIX, probe_ids())
    assert relative_error(logits_of(student), expected) <= 1e-5


@torch.no_grad()
def test_wrong_prefixes_are_seen():
    model = build("llama-gqa")
    states = prefix_states(model, PREFIX)
    expected = logits_behind(model, PREFIX, probe_ids())
    swapped = [(key.flip(1), value) for key, value in states]
    assert relative_error(logits_of(student_of(model, swapped)), expected) > 1e-3
    assert relative_error(logits_of(student_of(model, prefix_states(model, PREFIX[::-1]))), expected) > 1e-3
    moved = student_of(model, states)
    moved.model.rotary_emb.prefix_length = 1
    assert relative_error(logits_of(moved), expected) > 1e-3


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return quantized(request.param, backend="simulate")


def test_decoding_equals_prefill(model):
    exact = copy.deepcopy(model).double()
    with Float64():
        assert relative_error(decode(exact, probe_ids()), prefill(exact, probe_ids())) <= 1e-9


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model):
    exact, ids, by = copy.deepcopy(model).double(), probe_ids(), 3
    filler, ones = torch.full((len(ids), by), 5), torch.ones_like(ids)
    with Float64():
        plain = prefill(exact, ids)
        mask = torch.cat([torch.zeros_like(filler), ones], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = exact(torch.cat([filler, ids], 1), attention_mask=mask, position_ids=positions, use_cache=False).logits
        right = exact(torch.cat([ids, filler], 1), attention_mask=mask.flip(1), use_cache=False).logits
    assert relative_error(left[:, by:], plain) <= 1e-9
    assert relative_error(right[:, :-by], plain) <= 1e-9


def test_generate_with_any_cache_gives_the_tokens_of_no_cache(model):
    ids = probe_ids(length=6)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)
    filled = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    assert torch.equal(model.generate(filled, attention_mask=mask, **GREEDY)[:, 3:], expected)


def test_beams_and_a_continued_cache(model):
    ids = probe_ids(length=6)
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    again = model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again, model.generate(first.sequences, use_cache=False, **GREEDY))


@torch.no_grad()
def test_a_static_cache_holds_the_text_alone(model):
    ids, cache = probe_ids(), StaticCache(config=model.config, max_cache_len=16)
    logits = model(ids, past_key_values=cache).logits
    assert cache.get_seq_length() == ids.shape[1]
    assert relative_error(logits, logits_of(model)) <= 1e-2


def test_the_codes_of_the_prefix(model):
    plan = plan_of(build("llama-gqa"))
    codes = prefix_codes(model)
    assert prefix_length(model) == len(PREFIX) and len(codes) == plan.geometry.layers
    for key, value in codes:
        assert key.dtype == value.dtype == torch.uint8 and key.shape == value.shape and key.shape[1] == len(PREFIX)
    assert prefix_codes(build("llama-gqa")) == [] and prefix_length(build("llama-gqa")) == 0


def test_prepend():
    ids = probe_ids()
    assert prepend(ids, ()) is ids
    assert torch.equal(prepend(ids, PREFIX), torch.cat([torch.tensor([PREFIX, PREFIX]), ids], 1))
