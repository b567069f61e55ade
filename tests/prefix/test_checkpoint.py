"""A prefix is saved with the model, comes back bit for bit, and does not get lost on the way."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, inspect_checkpoint, perplexity, quantize
from optimum_mobilequant.nn.prefix import logits_behind, prefix_length
from tests.folding import relative_error
from tests.prefix.fixture import PREFIX, quantized, saved
from tests.tiny import FAMILIES, build, config, logits_of, probe_ids, run_python

RELOAD = """
import sys, torch
import optimum_mobilequant
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
from tests.tiny import probe_ids
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(probe_ids(), use_cache=False).logits
    ids = model.generate(probe_ids(), max_new_tokens=6, do_sample=False)
    save_file({"logits": logits, "ids": ids}, folder + "/out")
"""


def test_reload_in_a_fresh_process_is_bitwise(tmp_path):
    cases = [*((family, "w8a8") for family in FAMILIES), ("llama-gqa", "w4a8"), ("llama-gqa", "w8a8-full")]
    models = {f"{tmp_path}/{variant}-{preset}": quantized(variant, preset) for variant, preset in cases}
    for folder, model in models.items():
        model.save_pretrained(folder)
    done = run_python(RELOAD, *models)
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        found = load_file(f"{folder}/out")
        assert torch.equal(found["logits"], logits_of(model)), folder
        assert torch.equal(found["ids"], model.generate(probe_ids(), max_new_tokens=6, do_sample=False))


def test_the_config_of_a_checkpoint_states_the_tokens():
    stored = json.loads((saved() / "config.json").read_text())["quantization_config"]
    assert stored["prefix"] == PREFIX
    again = MobileQuantConfig.from_dict(stored)
    assert again.prefix_ids() == tuple(PREFIX) and again.to_dict() == MobileQuantConfig.from_dict(stored).to_dict()
    assert MobileQuantConfig(prefix=(1, 2)).prefix == [1, 2]
    for asked in (None, True, "auto", 3, False):
        assert MobileQuantConfig(prefix=asked).prefix_ids() == ()


@pytest.mark.parametrize("bad", [0, -1, [], [-1], [1.5], ["a"], "always", 2.5, [True]])
def test_values_that_are_no_prefix(bad):
    with pytest.raises(ValueError, match="prefix must be"):
        MobileQuantConfig(prefix=bad)


def test_recipes_and_prefixes():
    assert MobileQuantConfig(recipe="best").resolve().prefix == "auto"
    assert MobileQuantConfig(recipe="mobilequant").resolve().prefix is False
    assert MobileQuantConfig(recipe="best", prefix=False).resolve().prefix is False


def test_a_plain_model_gets_no_prefix_and_says_so():
    model = quantize(build("llama-gqa"), None, config(recipe="best", steps=1, rounding_steps=1))
    assert prefix_length(model) == 0
    assert model.config.quantization_config.prefix is False
    assert not any("prefix" in key for key in model.state_dict())
    without = quantize(build("llama-gqa"), None, config(recipe="best", steps=1, rounding_steps=1, prefix=False))
    assert torch.equal(logits_of(model), logits_of(without))


def test_inspect_lists_the_prefix():
    found = inspect_checkpoint(saved())
    rows = [row for row in found.rows if row["kind"] == "prefix"]
    assert len(rows) == 4 and all(row["bits"] == 8 for row in rows)
    assert found.totals["prefix_bytes"] == sum(row["bytes"] for row in rows) == 4 * len(PREFIX) * 2 * 8


def copy_of(folder, tmp_path):
    copied = tmp_path / "changed"
    shutil.copytree(folder, copied)
    return copied


@pytest.mark.parametrize("tokens", [[5, 8], [5], False])
def test_an_edited_prefix_is_refused(tmp_path, tokens):
    folder = copy_of(saved(), tmp_path)
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"]["prefix"] = tokens
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"prefix|config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_layer_of_the_prefix_is_refused(tmp_path):
    folder = copy_of(saved(), tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    del tensors["model.layers.1.self_attn.prefix.key"]
    save_file(tensors, file, metadata=header)
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*prefix\.key"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_dequantize_warns_and_the_tokens_in_front_give_the_same_model(caplog):
    model = AutoModelForCausalLM.from_pretrained(saved("llama-gqa", "w8a16"))
    expected = logits_of(model)
    plain = model.dequantize()
    assert f"behind the tokens {PREFIX}" in caplog.text
    assert prefix_length(plain) == 0
    with torch.no_grad():
        found = logits_behind(plain, PREFIX, probe_ids())
    assert relative_error(found, expected) < 0.2 < relative_error(logits_of(plain), expected)


def test_perplexity_of_the_float_control():
    ids, model = probe_ids(1, 60)[0], build("llama-gqa")
    with_prefix = perplexity(model, None, ids, seq_len=20, prefix=PREFIX, progress=False).perplexity
    assert with_prefix != perplexity(model, None, ids, seq_len=20, progress=False).perplexity
    own = perplexity(quantized(preset="w8a16"), None, ids, seq_len=20, progress=False).perplexity
    assert abs(own / with_prefix - 1) < 0.05
    with pytest.raises(ValueError, match="prefix of 2 tokens of its own"):
        perplexity(quantized(), None, ids, seq_len=20, prefix=PREFIX)
    with pytest.raises(ValueError, match="64 positions behind a prefix of 2"):
        perplexity(quantized(), None, ids, seq_len=63)


def test_a_prefix_without_room_is_refused_before_any_work():
    with pytest.raises(ValueError, match="prefix of 63 tokens leaves no room for text in the model's 64 positions"):
        quantize(build("llama-gqa"), None, config(prefix=[5] * 63))
    with pytest.raises(ValueError, match="token 96 is outside the vocabulary of 96"):
        quantize(build("llama-gqa"), None, config(prefix=[96]))
    model = quantize(build("llama-gqa"), None, config(prefix=[5] * 60))  # texts become shorter
    assert "of 4 tokens" in model.config.quantization_config.recorded["data"]


def test_rotary_tables_that_depend_on_the_text_are_refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match='rotary embedding of type "dynamic"'):
        quantize(build("llama-gqa", rope_parameters=dynamic), None, config(prefix=PREFIX))
    model = quantize(build("llama-gqa", rope_parameters=dynamic), None, config(prefix="auto"))
    assert prefix_length(model) == 0


KILL = """
import os, signal, sys, torch
torch.set_num_threads(1)
from optimum_mobilequant import quantize
from optimum_mobilequant.run import run_dir
from tests.tiny import build, config
stage, folder = sys.argv[1:]
original = run_dir.RunDirectory.save
def save(self, name, *arguments):
    original(self, name, *arguments)
    if name == stage:
        os.kill(os.getpid(), signal.SIGKILL)
run_dir.RunDirectory.save = save
quantize(build("llama-gqa"), None, config("w4a8", recipe="mobilequant", steps=3, prefix=2), run_dir=folder)
"""


@pytest.mark.parametrize("stage", ["prefix", "learn"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, stage):
    options = config("w4a8", recipe="mobilequant", steps=3, prefix=2)
    expected = quantize(build("llama-gqa"), None, options)
    killed = run_python(KILL, stage, tmp_path / "run")
    assert killed.returncode == -9, killed.stderr
    assert "04_prefix.safetensors" in os.listdir(tmp_path / "run")
    resumed = quantize(build("llama-gqa"), None, options, run_dir=str(tmp_path / "run"))
    assert prefix_length(resumed) >= 1
    a, b = resumed.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert resumed.config.quantization_config.prefix == expected.config.quantization_config.prefix


@pytest.mark.parametrize(
    ("tuning", "objective"),
    [("block-wise", "hidden_mse"), ("end-to-end", "hidden_mse"), ("end-to-end", "logits_kl")],
)
def test_learning_behind_a_prefix(tuning, objective):
    model = quantized(recipe="mobilequant", steps=2, tuning=tuning, objective=objective)
    loss = model.config.quantization_config.recorded["loss"]
    assert loss["best"] <= loss["start"]
