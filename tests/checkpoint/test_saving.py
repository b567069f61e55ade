"""Saving over existing folders, saving to a full disk, and reading without the plugin."""

import errno
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from optimum_mobilequant import quantize
from tests.tiny import FAMILIES, build, config, logits_of, run_python

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    quantize(build("qwen2"), None, config("w4a8-asym")).save_pretrained(tmp_path / "old")
    return tmp_path / "old"


def test_saving_over_the_folder_a_model_was_loaded_from(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits_of(model)
    model.save_pretrained(folder)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_saving_in_one_file_over_shards(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "new", max_shard_size="10KB")
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), logits_of(model))


@pytest.mark.parametrize(("preset", "intact"), [("w4a8-asym", True), ("w8a8", False)])
def test_full_disk_while_saving_over_a_checkpoint(folder, monkeypatch, preset, intact):
    """transformers writes config.json before the weights and in place. The error must reach the caller, and the mixed
    folder must not load as something else: with the same scheme it is the old checkpoint, otherwise it is refused."""
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    old = (folder / WEIGHTS).read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = quantize(build("qwen2", seed=1), None, config(preset))
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == old
    if intact:
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), expected)
    else:
        with pytest.raises(ValueError, match="lacks .* tensors, among them"):
            AutoModelForCausalLM.from_pretrained(folder)


STOCK = """
import json, sys
from transformers import AutoModelForCausalLM
outcome = {}
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        outcome[folder] = "loaded"
    except Exception as error:
        outcome[folder] = f"{type(error).__name__}: {error}"
assert not any("optimum_mobilequant" in name for name in sys.modules)
print(json.dumps(outcome))
"""


def test_transformers_without_the_plugin_raises(tmp_path):
    """Otherwise it would return random weights with a warning."""
    folders = []
    for variant in FAMILIES:
        model = quantize(build(variant), None, config())
        model.save_pretrained(tmp_path / variant)
        model.save_pretrained(tmp_path / f"{variant}-shards", max_shard_size="20KB")
        folders += [tmp_path / variant, tmp_path / f"{variant}-shards"]
    config_file = folders[0] / "config.json"  # not even told that it is quantized
    plain = {k: v for k, v in json.loads(config_file.read_text()).items() if k != "quantization_config"}
    config_file.write_text(json.dumps(plain))
    result = run_python(STOCK, *folders)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert len(outcome) == 2 * len(FAMILIES)
    assert [folder for folder, what in outcome.items() if what == "loaded"] == []
    assert (
        sum("q_proj.weight" in what or "mismatch" in what.lower() for what in outcome.values())
        >= 2 * len(FAMILIES) - 1
    )
