"""What is saved is what was computed: reloading in a fresh process gives the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.plan import PRESETS
from tests.tiny import FAMILIES, build, config, logits_of, probe_ids, run_python, token_ids

GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
RELOAD = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
import optimum_mobilequant
from tests.tiny import logits_of, probe_ids

def content(file):
    # safetensors writes its metadata in any order; tensors, their order and their bytes must be equal
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return header, [key for key in header if key != "__metadata__"], data[start:]

wrong, generate = [], json.loads(sys.argv[2])
folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/*/config.json"))
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = load_file(folder / "expected" / "outputs.safetensors")
    if not torch.equal(logits_of(model), expected["logits"]):
        wrong.append(f"{folder}: logits differ")
    if not torch.equal(model.generate(probe_ids(length=6), **generate), expected["tokens"]):
        wrong.append(f"{folder}: tokens differ")
    model.save_pretrained(folder / "again")
    if content(folder / "again" / "model.safetensors") != content(folder / "model.safetensors"):
        wrong.append(f"{folder}: saving again changed the file")
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, folder / "again")]
    if configs[0] != configs[1]:
        wrong.append(f"{folder}: saving again changed the config")
print(json.dumps({"wrong": wrong, "count": len(folders)}))
"""


def save_with_outputs(model, folder):
    model.save_pretrained(folder)
    outputs = {"logits": logits_of(model), "tokens": model.generate(probe_ids(length=6), **GENERATE)}
    (folder / "expected").mkdir()
    save_file(outputs, folder / "expected" / "outputs.safetensors")


def test_a_fresh_process_reproduces_every_checkpoint(tmp_path):
    for variant in (*FAMILIES, "llama-bias"):
        for preset in PRESETS:
            save_with_outputs(quantize(build(variant), None, config(preset)), tmp_path / variant / preset)
        learned = quantize(build(variant), None, config("w4a8", recipe="mobilequant", steps=2))
        save_with_outputs(learned, tmp_path / variant / "learned")
    result = run_python(RELOAD, tmp_path, json.dumps(GENERATE))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == {"wrong": [], "count": 8 * (len(PRESETS) + 1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized model of each family, and where it is saved."""
    made = {}

    def get(variant="llama-gqa", preset="w4a8-asym"):
        if (variant, preset) not in made:
            model = quantize(build(variant), None, config(preset))
            folder = tmp_path_factory.mktemp(variant)
            model.save_pretrained(folder)
            made[variant, preset] = model, folder
        return made[variant, preset]

    return get


def same_tensors(a, b, *, except_anchor=False):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        if not (except_anchor and "dtype_anchor" in key):
            assert tensor.dtype == b[key].dtype, key
            assert torch.equal(tensor, b[key]), key


@pytest.mark.parametrize("variant", ["llama-tied", "stablelm"])
def test_shards(saved, tmp_path, variant):
    model, _ = saved(variant)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_tensors(model, loaded)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma", "qwen2", "stablelm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_low_precision_keeps_what_is_stored(saved, tmp_path, variant, dtype):
    model, folder = saved(variant)
    low = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert low.dtype == dtype
    same_tensors(model, low, except_anchor=True)
    logits = logits_of(low)
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    low.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(back), logits_of(model))


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_attention_asked_for_while_loading_cannot_replace_the_quantized_one(saved, asked):
    model, folder = saved()
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=asked)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_cast_model_saves_the_same_integers(saved, tmp_path):
    model, folder = saved("qwen2")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_deep_copy_is_independent_and_saveable(saved, tmp_path):
    import copy

    model, _ = saved("llama-tied")
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    reference = logits_of(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight._scale.mul_(2)
    assert torch.equal(logits_of(model), reference)
    assert not torch.equal(logits_of(twin), reference)  # the tied head of the copy reads the copy's table


@pytest.mark.parametrize(("preset", "share"), [("w8a8", 0.45), ("w4a8", 0.40)])
def test_files_shrink(tmp_path, preset, share):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    model = build("llama-gqa", **sizes)
    model.save_pretrained(tmp_path / "float")
    quantize(model, None, config(preset)).save_pretrained(tmp_path / "int")
    before, after = ((tmp_path / f / "model.safetensors").stat().st_size for f in ("float", "int"))
    assert after < share * before


@pytest.mark.parametrize("as_dict", [False, True], ids=["config", "dict"])
def test_quantizing_while_loading_equals_quantizing_in_memory(tmp_path, as_dict):
    build("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    options = config("w4a8")
    expected = quantize(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), None, config("w4a8"))
    if as_dict:
        options = {"quant_method": "mobilequant", "preset": "w4a8", "recipe": "rtn", "effort": "none"}
        options |= {"dataset": token_ids(), "samples": 8, "seq_len": 16, "batch_size": 4}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    same_tensors(expected, loaded)
    assert torch.equal(logits_of(loaded), logits_of(expected))
    loaded.save_pretrained(tmp_path / "int")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "int")), logits_of(expected))


def test_config_of_a_checkpoint_holds_no_data_and_everything_measured(saved):
    _, folder = saved()
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["dataset"].keys() == {"kind", "count", "sha256"}
    assert stored["tokenizer"] is stored["run_dir"] is None
    assert {"versions", "validation_perplexity", "peak_memory_bytes", "data_sha256"} <= stored["recorded"].keys()
    assert stored["scheme"] == PRESETS["w4a8-asym"].to_dict()
    assert MobileQuantConfig.from_dict(stored).to_dict() == stored


def test_a_later_change_of_the_preset_table_does_not_reach_old_checkpoints(saved, monkeypatch):
    model, folder = saved()
    monkeypatch.setitem(PRESETS, "w4a8-asym", PRESETS["w8a16"])
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a8-asym"])
def test_stored_keys_are_read_by_quanto(saved, preset):
    from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor, qint4, qint8

    model, folder = saved("llama-gqa", preset)
    name = "model.layers.0.mlp.up_proj"
    prefix = f"{name}.weight."
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith(prefix)}
    weight, missing = model.get_submodule(name).weight, []
    size, stride = weight.shape, (weight.shape[1], 1)
    if preset == "w8a8":
        tensor = WeightQBytesTensor.load_from_state_dict(state, prefix, qint8, 0, size, stride, None, missing)
    else:
        tensor = WeightQBitsTensor.load_from_state_dict(state, prefix, qint4, 0, None, size, stride, missing)
    assert missing == []
    assert not state, "quanto left keys unread"
    assert torch.allclose(tensor.dequantize(), weight(), rtol=1e-6, atol=0)
