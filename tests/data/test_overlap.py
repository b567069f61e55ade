"""Text that a model was calibrated on is noticed when it is scored."""

import json
from types import SimpleNamespace

import pytest
import torch

from optimum_mobilequant import MobileQuantConfig, perplexity, quantize
from optimum_mobilequant.data import overlap
from optimum_mobilequant.data.overlap import COUNT, LENGTH, passages_of
from tests.tiny import build, config

GENERATOR = torch.Generator().manual_seed(0)


def ids_of(count, vocabulary=96):
    return torch.randint(3, vocabulary, (count,), generator=GENERATOR)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(overlap.logger, "warning", lambda message, *a: found.append(message))
    return found


def test_passages_are_hashes_of_bounded_number_and_survive_json():
    ids = ids_of(20_000)
    record = passages_of(ids.view(-1, 200))
    assert record["length"] == LENGTH and COUNT // 2 < len(record["hashes"]) <= COUNT
    assert json.loads(json.dumps(record)) == record
    assert passages_of(ids[: LENGTH - 1][None]) is None
    assert len(passages_of(ids[:LENGTH][None])["hashes"]) == 1


def test_share_of_the_passages_found_at_any_offset():
    ids = ids_of(20_000)
    recorded = {"passages": passages_of(ids.view(-1, 200))}
    assert overlap.overlap(recorded, ids) == 1
    assert overlap.overlap(recorded, torch.cat([torch.tensor([1, 5, 7]), ids])) == 1
    assert 0.3 < overlap.overlap(recorded, ids[:10_000]) < 0.7
    assert overlap.overlap(recorded, ids_of(20_000)) == 0
    changed = ids.clone()
    changed[::LENGTH] = 2  # no passage is left whole
    assert overlap.overlap(recorded, changed) == 0


@pytest.mark.parametrize("record", [None, {}, {"passages": None}, {"passages": {"length": 3}}, {"passages": "x"}])
def test_a_missing_or_damaged_record_finds_nothing(record):
    assert overlap.overlap(record, ids_of(100)) == 0


def test_a_quantized_model_warns_on_its_calibration_text_alone(warnings, tmp_path):
    from transformers import AutoModelForCausalLM

    text, other = ids_of(2400), ids_of(2400)
    model = quantize(
        build("llama-gqa"), None, config("w8a8", dataset=text.view(-1, 48).tolist(), seq_len=48, samples=40)
    )
    perplexity(model, None, other, seq_len=32, progress=False)
    perplexity(build("llama-gqa"), None, text, seq_len=32, progress=False)  # a float model was calibrated on nothing
    assert not warnings
    perplexity(model, None, text, seq_len=32, progress=False)
    model.save_pretrained(tmp_path)
    perplexity(AutoModelForCausalLM.from_pretrained(tmp_path), None, text[7:], seq_len=32, progress=False)
    assert len(warnings) == 2
    assert all("calibrated on text that it is scored on" in message for message in warnings)


def test_text_of_fine_tuning_counts_too(warnings):
    text, more = ids_of(1200), ids_of(1200)
    options = {"recipe": "rtn", "effort": "light", "steps": None, "finetune": "scales", "finetune_steps": 1}
    options |= {"dataset": text.view(-1, 48).tolist(), "finetune_dataset": more.view(-1, 48).tolist(), "seq_len": 48}
    model = quantize(build("llama-gqa"), None, config("w8a8", **options, finetune_samples=20))
    perplexity(model, None, more, seq_len=32, progress=False)
    assert len(warnings) == 1


def test_compare_warns_as_well(warnings, tmp_path):
    from optimum_mobilequant import compare

    text = ids_of(1200)
    model = quantize(build("llama-gqa"), None, config("w8a8", dataset=text.view(-1, 48).tolist(), seq_len=48))
    model.save_pretrained(tmp_path)
    compare(tmp_path, text, seq_len=32, tokens=64, progress=False)
    assert len(warnings) == 1


def test_a_config_read_as_plain_json_is_understood(warnings):
    text = ids_of(400)
    recorded = {"passages": passages_of(text[None])}
    plain = SimpleNamespace(config=SimpleNamespace(quantization_config={"recorded": recorded}))
    overlap.warn_if_calibrated_on(plain, text)
    overlap.warn_if_calibrated_on(SimpleNamespace(config=SimpleNamespace()), text)
    assert len(warnings) == 1
    assert MobileQuantConfig(recorded=recorded).to_dict()["recorded"] == recorded
