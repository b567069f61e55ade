"""Token-adaptive precision: which tokens, which places, and that nothing is left behind."""

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.evaluate.tokens import coarse, token_adaptive, token_scores
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.nn import Quantizer
from optimum_mobilequant.plan import ActivationSpec
from optimum_mobilequant.runtime.backend import simulated
from tests.tiny import build, config, logits_of, probe_ids, token_ids


@pytest.fixture(scope="module")
def model():
    return quantize(build("llama-gqa", num_hidden_layers=3), None, config("w8a8", prefix=[7]))


CALIBRATION = torch.tensor(token_ids())


@pytest.fixture(autouse=True)
def simulation(model):
    with simulated(model):
        yield


def test_no_low_tokens_is_the_plain_model_and_all_is_put_back(model):
    expected = logits_of(model)
    with token_adaptive(model, CALIBRATION, 0.0) as found:
        assert torch.equal(logits_of(model), expected)
    assert found.share == 0 and found.tokens > 0
    with token_adaptive(model, CALIBRATION, 0.5):
        assert not torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), expected)


def test_more_low_tokens_are_a_larger_error(model):
    expected, errors = logits_of(model), []
    for share in (0.2, 0.5, 0.9):
        with token_adaptive(model, CALIBRATION, share) as found:
            errors.append((logits_of(model) - expected).norm())
        assert found.share == pytest.approx(share, abs=0.2)
    assert errors[0] < errors[1] < errors[2]


def test_a_token_does_not_depend_on_those_behind_it(model):
    ids = probe_ids()
    with token_adaptive(model, CALIBRATION, 0.5):
        whole, start = logits_of(model, ids), logits_of(model, ids[:, :5])
    assert torch.allclose(whole[:, :5], start, atol=1e-4)


def test_low_tokens_alone_are_rounded_to_sixteen_values(model):
    seen = {}
    attention = model.model.layers[1].self_attn
    with token_adaptive(model, CALIBRATION, 0.5) as found:
        handle = attention.v_proj.output.register_forward_hook(lambda m, a, out: seen.update(value=out))
        logits_of(model)
        handle.remove()
        mask = found.masks[1]
    codes = (seen["value"] / attention.v_proj.output.scale).round()
    assert mask.any() and not mask.all()
    assert (codes[mask] % 17 == 0).all() and len(codes[mask].unique()) <= 16
    assert not (codes[~mask] % 17 == 0).all()


@pytest.mark.parametrize("zero_point", [0, 3, 100, 128, 250, 255])
def test_coarse_values_are_codes_of_the_8_bit_grid(zero_point):
    quantizer = Quantizer(ActivationSpec("x", "value", 8))
    quantizer.set(torch.tensor(0.5), torch.tensor(zero_point))
    x = quantizer(torch.linspace(-200, 200, 4001))
    found = coarse(x, quantizer)
    codes = found / 0.5 + zero_point
    assert codes.min() >= 0 and codes.max() <= 255 and len(codes.unique()) <= 16
    assert coarse(torch.zeros(1), quantizer) == 0
    assert (found - x).abs().max() <= 0.5 * 17


def test_the_score_is_the_logit_with_the_first_key():
    scores = torch.arange(24.0).view(1, 2, 3, 4)
    assert token_scores(scores).tolist() == [[0 + 12, 4 + 16, 8 + 20]]


def test_no_file_and_no_graph_can_hold_it(model, tmp_path):
    with token_adaptive(model, CALIBRATION, 0.5):
        with pytest.raises(ValueError, match="token-adaptive precision, which a checkpoint cannot hold.*CPU and GPU"):
            model.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="token-adaptive precision, which an integer graph cannot hold"):
            IntegerExecutor.of(model)
    assert not list(tmp_path.glob("saved/*.safetensors"))
    model.save_pretrained(tmp_path / "saved")  # outside the block it is the plain model
    IntegerExecutor.of(model)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\)"), token_adaptive(model, CALIBRATION, 1):
        pass
    refused = pytest.raises(ValueError, match="that optimum_mobilequant quantized")
    with refused, token_adaptive(build("llama"), CALIBRATION, 0.5):
        pass
    wide = quantize(build("llama"), None, config("w8a16"))
    with pytest.raises(ValueError, match="has 16 bits, not 8"), token_adaptive(wide, CALIBRATION, 0.5):
        pass
    with token_adaptive(model, CALIBRATION, 0.5), pytest.raises(ValueError, match="use_cache=False"):
        cache = model(input_ids=probe_ids(), use_cache=True).past_key_values
        model(input_ids=probe_ids()[:, :1], past_key_values=cache)
