"""A static encoding does not depend on what else is in the batch or the cache: decoding equals prefill."""

import copy
from types import SimpleNamespace

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.nn.attention import quantized_attention
from optimum_mobilequant.tune import build_student
from tests.folding import Float64, decode, prefill, relative_error
from tests.tiny import FAMILIES, build, config, logits_of, plan_of, probe_ids


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(request):
    return quantize(build(request.param), None, config("w8a8", backend="simulate"))


def padded(ids, by):
    """Left-padded copy with its mask and positions."""
    mask = torch.cat([torch.zeros(len(ids), by, dtype=torch.long), torch.ones_like(ids)], 1)
    filled = torch.cat([torch.full((len(ids), by), 5), ids], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": filled, "attention_mask": mask, "position_ids": positions}


def test_decoding_equals_prefill_in_float64(quantized):
    """In float64 no sum lands on the other side of a rounding boundary, so the two must agree to its accuracy."""
    exact = copy.deepcopy(quantized).double()
    with Float64():
        assert relative_error(decode(exact, probe_ids()), prefill(exact, probe_ids())) <= 1e-9


def test_decoding_equals_prefill_in_float32(quantized):
    # single codes may round the other way, because matrix products of other shapes sum in another order
    assert relative_error(decode(quantized, probe_ids()), prefill(quantized, probe_ids())) <= 1e-2


def test_generation_with_and_without_cache_gives_the_same_tokens(quantized):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = probe_ids(length=6)
    with_cache = quantized.generate(ids, use_cache=True, **options)
    assert with_cache.shape == (2, 14)
    assert torch.equal(with_cache, quantized.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_left_padding_changes_nothing(quantized):
    exact, ids = copy.deepcopy(quantized).double(), probe_ids()
    with Float64():
        plain = prefill(exact, ids)
        shifted = exact(**padded(ids, 3), use_cache=False).logits[:, 3:]
    assert relative_error(shifted, plain) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_padded_batch_stays_finite_in_low_precision(quantized, dtype):
    logits = copy.deepcopy(quantized).to(dtype)(**padded(probe_ids(), 3), use_cache=False).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_a_row_of_padding_with_low_scores_stays_finite_in_float16():
    """The float16 sum of a score of -50 and the mask's -65504 is -inf; a whole row of it would give NaN."""
    same = torch.nn.Identity()
    module = SimpleNamespace(query_rotated=same, key_rotated=same, scores=same, probabilities=same, context=same)
    ones, hidden = torch.ones(1, 1, 2, 4, dtype=torch.float16), torch.finfo(torch.float16).min
    mask = torch.tensor([[hidden, hidden], [0.0, 0.0]], dtype=torch.float16)[None, None]
    context, _ = quantized_attention(module, -12.5 * ones, ones, ones, mask, 1.0)
    assert context.dtype == torch.float16 and torch.isfinite(context).all()


def test_future_tokens_have_no_influence(quantized):
    ids = probe_ids()
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 11) % 90
    assert torch.equal(logits_of(quantized, ids)[:, :8], logits_of(quantized, other)[:, :8])


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_cache_implementations_agree(cache):
    model = quantize(build("llama-gqa"), None, config())
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(probe_ids(length=6), use_cache=False, **options)
    found = model.generate(probe_ids(length=6), cache_implementation=cache, disable_compile=True, **options)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("run", [prefill, decode])
def test_sliding_window_is_respected(run):
    model, unlimited = (build("mistral", sliding_window=window) for window in (4, None))
    assert relative_error(run(unlimited, probe_ids()), run(model, probe_ids())) > 1e-2
    student = build_student(model, plan_of(model))
    set_mode(student, Mode.OFF)
    assert relative_error(run(student, probe_ids()), run(model, probe_ids())) <= 2e-5


@torch.no_grad()
def test_padding_mask_is_respected_without_rounding():
    model = build("llama-gqa")
    student = build_student(model, plan_of(model))
    set_mode(student, Mode.OFF)
    inputs = padded(probe_ids(), 3)
    float_logits, found = (m(**inputs, use_cache=False).logits[:, 3:] for m in (model, student))
    assert relative_error(found, float_logits) <= 2e-5


def test_export_computes_the_same_bits(quantized):
    """The graph that torch.export traces, which converters start from."""
    inputs = {"input_ids": probe_ids(), "use_cache": False}
    exported = torch.export.export(quantized, (), inputs, strict=False).module()
    assert torch.equal(exported(**inputs).logits, logits_of(quantized))
