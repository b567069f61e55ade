"""Damaged or edited checkpoints give one clear error, and never a model that computes something else."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.hf_quantizer import MobileQuantHfQuantizer
from tests.tiny import build, config, logits_of, token_ids

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    quantize(build("qwen2"), None, config("w4a8-asym")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def edit_tensors(folder, change):
    """Rewrite the weight file with ``change(tensors)``, header metadata kept."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def edit_config(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


UP = "model.layers.0.mlp.up_proj"
DAMAGED_TENSORS = {
    "missing": (lambda t: t.pop(f"{UP}.weight._shift"), f"lacks 1 tensors, among them {UP}.weight._shift"),
    "encoding missing": (lambda t: t.pop(f"{UP}.output.scale"), f"lacks 1 tensors, among them {UP}.output.scale"),
    "unexpected": (
        lambda t: t.update({f"{UP}.weight": torch.zeros(2)}),
        f"does not provide for, among them {UP}.weight",
    ),
    "shape": (
        lambda t: t.update({f"{UP}.weight._scale": torch.ones(1)}),
        rf"{UP}.weight._scale in model.safetensors is F32 \[1\], but the config asks for F32 \[48, 1\]",
    ),
    "integers as floats": (
        lambda t: t.update({f"{UP}.weight._data._data": t[f"{UP}.weight._data._data"].float()}),
        r"is F32 \[24, 32\], but the config asks for U8 \[24, 32\]",
    ),
    "other integers": (
        lambda t: t.update({f"{UP}.weight._data._data": t[f"{UP}.weight._data._data"].to(torch.int8)}),
        r"is I8 \[24, 32\], but the config asks for U8",
    ),
    "NaN weight scale": (
        lambda t: t[f"{UP}.weight._scale"].fill_(float("nan")),
        f"{UP}.weight._scale in the checkpoint is not finite and positive",
    ),
    "negative scale": (
        lambda t: t[f"{UP}.output.scale"].neg_(),
        f"{UP}.output.scale in the checkpoint is not finite and positive",
    ),
    "infinite scale": (
        lambda t: t["lm_head.output.scale"].fill_(float("inf")),
        "lm_head.output.scale in the checkpoint is not finite and positive",
    ),
    "zero point off its grid": (
        lambda t: t[f"{UP}.output.zero_point"].fill_(300),
        f"{UP}.output.zero_point in the checkpoint is 300, outside 0 to 255",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_damaged_tensors(folder, case):
    change, message = DAMAGED_TENSORS[case]
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


EDITED_CONFIGS = {
    "activation bits": lambda c: c["scheme"]["activations"].update(up=16),
    "symmetric weights": lambda c: [rule.update(symmetric=True) for rule in c["scheme"]["weights"].values()],
    "granularity": lambda c: c["scheme"]["weights"]["up"].update(granularity="tensor"),
    "override added": lambda c: c.update(overrides={f"{UP}.output": {"bits": 16}}),
}


@pytest.mark.parametrize("case", EDITED_CONFIGS)
def test_edited_scheme_of_the_same_shapes(folder, case):
    edit_config(folder, EDITED_CONFIGS[case])
    with pytest.raises(ValueError, match="the quantization scheme in config.json is not the one these weights"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: (c.pop("scheme"), c.pop("preset")),
            "config.json and weights do not belong together|lacks .* tensors",
        ),
        (lambda c: c["scheme"]["weights"]["up"].update(bits=8), "lacks .* tensors, among them"),
        (lambda c: c["scheme"]["weights"].pop("gain"), "the scheme's weights do not fit this version: missing"),
        (lambda c: c["scheme"].pop("activations"), "the stored scheme is damaged"),
        (lambda c: c.update(format_version=99), "format_version 99, this package reads up to 1; upgrade"),
        (lambda c: c.update(new_option=1), '"new_option" is unknown'),
        (lambda c: c.update(family="gemma"), 'scheme in config.json is not the one|family "gemma" expects'),
    ],
    ids=["no scheme", "weight bits", "role missing", "no activations", "newer format", "unknown option", "family"],
)
def test_edited_config(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_file(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def sharded(original, tmp_path):
    AutoModelForCausalLM.from_pretrained(original).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    return tmp_path / "shards"


def test_truncated_shard(sharded):
    victim = sorted(sharded.glob("model-*"))[1]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{victim.name} is damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_missing_shard(sharded):
    victim = sorted(sharded.glob("model-*"))[1]
    victim.unlink()
    with pytest.raises((OSError, ValueError), match=victim.name):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_shard_of_another_checkpoint(sharded, tmp_path):
    other = quantize(build("qwen2", seed=5), None, config("w4a8"))
    other.save_pretrained(tmp_path / "whole")
    # loaded first, as the victim was: transformers orders the tensors of loaded models differently
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    other.save_pretrained(tmp_path / "other", max_shard_size="10KB")
    victim = sorted(sharded.glob("model-*"))[1]
    shutil.copy(tmp_path / "other" / victim.name, victim)
    with pytest.raises(ValueError, match="not the one these weights were written with"):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_other_weight_formats_are_refused(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_model_of_another_size_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match="but the config asks for"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_offloading_is_refused(folder, device_map, tmp_path):
    with pytest.raises(ValueError, match="supports no disk offload"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")


def test_quantizing_over_several_devices_is_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(MobileQuantHfQuantizer, "_process_model_before_weight_loading", None)
    with pytest.raises(ValueError, match="quantizing runs on one device, and this device_map names 2; use"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map={"model": 0, "lm_head": 1}, quantization_config=MobileQuantConfig(dataset=token_ids())
        )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_one_device_is_allowed(folder, device_map):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)).cpu(), expected)
