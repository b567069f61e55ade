"""The compressed-tensors checkpoint: plain transformers reads it, with this package's integers and static inputs."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_mobilequant import quantize, set_backend
from optimum_mobilequant.checkpoint.pack import input_of
from optimum_mobilequant.exporters import compressed_tensors as module
from optimum_mobilequant.exporters.compressed_tensors import export_compressed_tensors, pack
from optimum_mobilequant.exporters.linear_schemes import choose_schemes
from optimum_mobilequant.exporters.options import ExportOptions
from optimum_mobilequant.exporters.weight_files import Entry, write_weights
from optimum_mobilequant.hf_quantizer import plan_of
from optimum_mobilequant.nn.quantizer import Mode, quantizers_of
from optimum_mobilequant.numerics.packing import pack_int4
from tests import tiny
from tests.graph.floating import decibels

# Older ones are what pip takes beside the oldest torch.
pytest.importorskip("compressed_tensors", minversion="0.20", reason="the reader of what is written here")

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SERVED, ALL = (ExportOptions(context=64, prompt_length=16, all_inputs=everything) for everything in (False, True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(variant, preset) -> folder of a saved checkpoint; each is made once."""
    cache = {}

    def make(variant="llama-gqa", preset="w8a8", **options):
        key = (variant, preset, str(options))
        if key not in cache:
            cache[key] = tmp_path_factory.mktemp("checkpoint")
            quantize(tiny.build(variant), None, tiny.config(preset, **options)).save_pretrained(cache[key])
        return cache[key]

    return make


def simulated(folder, *, rounds):
    """Our model with only those quantizers on that the exported model has: the inputs of the projections."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_backend(model, "simulate")
    plan = plan_of(model, model.config.quantization_config)
    schemes = choose_schemes(plan, all_inputs=rounds == "all")
    kept = {input_of(plan, path) for path, scheme in schemes.items() if scheme.input_bits is not None}
    for quantizer in quantizers_of(model):
        quantizer.mode = Mode.QUANTIZE if quantizer.spec.name in kept else Mode.OFF
    return model, kept


def read(folder):
    """What transformers and compressed-tensors make of a folder, and that every tensor found its place."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


PRESETS = ["w8a8", "w4a8", "w4a8-asym", "w8a8-paper", "w8a16", "w8a8-full"]
CASES = [("llama-bias", preset) for preset in PRESETS] + [(variant, "w8a8") for variant in tiny.FAMILIES]


@pytest.mark.parametrize("rounds", ["served", "all"])
@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_transformers_computes_what_the_kept_encodings_say(checkpoint, tmp_path, variant, preset, rounds):
    folder = checkpoint(variant, preset)
    export_compressed_tensors(folder, tmp_path, ALL if rounds == "all" else SERVED)
    expected, kept = simulated(folder, rounds=rounds)
    assert bool(kept) == (rounds == "all" or preset not in ("w4a8", "w8a16"))
    # Sums are taken in another order, so an input may fall on the other side of a rounding step once in a while.
    assert decibels(tiny.logits_of(expected), tiny.logits_of(read(tmp_path))) > 45


def test_shifted_keys_need_nothing(checkpoint, tmp_path):
    """Attention stays float there, and float attention does not see the shift."""
    folder = checkpoint("qwen2", "w8a8", key_shift=True)
    export_compressed_tensors(folder, tmp_path, SERVED)
    assert decibels(tiny.logits_of(simulated(folder, rounds="served")[0]), tiny.logits_of(read(tmp_path))) > 45


def test_leaving_the_static_inputs_out_is_noticed(checkpoint, tmp_path):
    """Control of the test above."""
    export_compressed_tensors(checkpoint(), tmp_path, SERVED)
    weights = AutoModelForCausalLM.from_pretrained(checkpoint()).dequantize()
    assert decibels(tiny.logits_of(weights), tiny.logits_of(read(tmp_path))) < 40


@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_simulation_is_near(checkpoint, tmp_path, preset):
    """The reader leaves out what the format cannot say; what is left decides most tokens alike."""
    folder = checkpoint("llama-gqa", preset)
    export_compressed_tensors(folder, tmp_path, ALL)
    exact, near = (tiny.logits_of(m) for m in (AutoModelForCausalLM.from_pretrained(folder), read(tmp_path)))
    assert decibels(exact, near) > 15
    assert (exact.argmax(-1) == near.argmax(-1)).float().mean() > 0.8


def test_a_process_without_this_package_reads_it(checkpoint, tmp_path):
    export_compressed_tensors(checkpoint("qwen2"), tmp_path / "", SERVED)
    code = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.arange(3, 15)[None]
save_file({"logits": model(ids).logits.detach(), "text": model.generate(ids, max_new_tokens=4)}, out)
assert not any(name.startswith("optimum_mobilequant") for name in sys.modules)
"""
    done = tiny.run_python(code, tmp_path, tmp_path / "result.safetensors")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "result.safetensors")
    expected, _ = simulated(checkpoint("qwen2"), rounds="served")
    assert decibels(tiny.logits_of(expected, torch.arange(3, 15)[None]), found["logits"]) > 45
    assert found["text"].shape == (1, 16)


def test_the_files_hold_the_checkpoints_integers(checkpoint, tmp_path):
    folder = checkpoint("llama-bias")
    export_compressed_tensors(folder, tmp_path, SERVED)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert torch.equal(after[f"{QUERY}.weight"], before[f"{QUERY}.weight._data"])
    assert torch.equal(after[f"{QUERY}.weight_scale"], before[f"{QUERY}.weight._scale"])
    assert torch.equal(after[f"{QUERY}.bias"], before[f"{QUERY}.bias"])
    norm = "model.layers.0.input_layernorm"  # what the query projection reads
    assert after[f"{QUERY}.input_scale"] == before[f"{norm}.output.scale"]
    assert after[f"{QUERY}.input_zero_point"].dtype == torch.int8
    assert after[f"{QUERY}.input_zero_point"].item() == before[f"{norm}.output.zero_point"].item() - 128
    gain = before[f"{norm}.weight._codes"].float() * before[f"{norm}.weight._scale"]
    assert torch.equal(after[f"{norm}.weight"], gain)
    table = before["model.embed_tokens.weight._data"].float() * before["model.embed_tokens.weight._scale"]
    assert torch.equal(after["model.embed_tokens.weight"], table)
    assert not any(key.endswith("_zero_point") for key in after if "weight_" in key)
    assert not any("lm_head.weight_" in key for key in after)


def test_gemmas_gains_are_stored_as_gemma_stores_them(checkpoint, tmp_path):
    export_compressed_tensors(checkpoint("gemma"), tmp_path, SERVED)
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint("gemma"), tmp_path))
    gain = before["model.norm.weight._codes"].float() * before["model.norm.weight._scale"]
    assert torch.equal(after["model.norm.weight"], gain - 1.0)
    assert "lm_head.weight" not in after  # tied


def groups_of(folder):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    return stored, list(stored["config_groups"].values())


@pytest.mark.parametrize(
    ("preset", "options", "form", "bits", "symmetric", "inputs"),
    [
        ("w8a8", SERVED, "int-quantized", 8, True, 8),
        ("w4a8", SERVED, "pack-quantized", 4, True, None),
        ("w4a8", ALL, "pack-quantized", 4, True, 8),
        ("w4a8-asym", SERVED, "int-quantized", 4, False, 8),
        ("w8a8-paper", SERVED, "int-quantized", 8, False, 8),
        ("w8a16", SERVED, "pack-quantized", 8, True, None),
        ("w8a16", ALL, "int-quantized", 8, True, 16),
        ("w8a8-full", SERVED, "int-quantized", 8, True, 8),
    ],
)
def test_the_config_says_how_a_preset_is_written(checkpoint, tmp_path, preset, options, form, bits, symmetric, inputs):
    result = export_compressed_tensors(checkpoint("llama-gqa", preset), tmp_path, options)
    stored, (group,) = groups_of(tmp_path)
    assert stored["format"] == group["format"] == form
    assert (stored["quant_method"], stored["ignore"]) == ("compressed-tensors", ["lm_head"])
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["symmetric"]) == (bits, symmetric)
    found = group["input_activations"]
    assert (found and found["num_bits"]) == inputs
    assert found is None or (not found["symmetric"] and not found["dynamic"] and found["strategy"] == "tensor")
    assert result.summary["static_inputs"] == (14 if inputs else 0)
    assert result.summary["for_vllm"] == (options is SERVED and symmetric)
    assert set(result.files) == {p.name for p in tmp_path.iterdir()}


def test_schemes_of_a_mixed_model_target_their_own_layers(checkpoint, tmp_path):
    overrides = {"*.down_proj": {"weight_bits": 4}, "model.layers.1.self_attn.o_proj": {"weight_bits": 4}}
    result = export_compressed_tensors(checkpoint("llama-gqa", "w8a8", overrides=overrides), tmp_path, SERVED)
    stored, groups = groups_of(tmp_path)
    assert stored["format"] == "mixed-precision"
    by_form = {group["format"]: group["targets"] for group in groups}
    assert by_form["pack-quantized"] == ["model.layers.1.self_attn.o_proj", r"re:.*\.mlp\.down_proj$"]
    assert "model.layers.0.self_attn.o_proj" in by_form["int-quantized"]
    hit = [t for t in by_form["int-quantized"] if t.startswith("re:") and re.match(t[3:], QUERY)]
    assert len(hit) == 1
    assert result.summary["for_vllm"]
    expected, _ = simulated(checkpoint("llama-gqa", "w8a8", overrides=overrides), rounds="served")
    assert decibels(tiny.logits_of(expected), tiny.logits_of(read(tmp_path))) > 45


def test_layers_that_vllm_fuses_must_be_alike(checkpoint, tmp_path):
    overrides = {"model.layers.1.mlp.up_proj": {"weight_bits": 4}}
    result = export_compressed_tensors(checkpoint("llama-gqa", "w8a8", overrides=overrides), tmp_path, SERVED)
    assert not result.summary["for_vllm"]


@pytest.mark.parametrize(("bits", "columns"), [(4, 64), (4, 43), (8, 64), (8, 5), (4, 1)])
def test_packing_is_the_formats_own(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (6, columns), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    codes[0, 0], codes[1, 0] = low, high - 1
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    if bits == 4 and columns % 2 == 0:
        assert not torch.equal(pack(codes, bits).view(torch.uint8), pack_int4(codes))  # control: not quanto's layout


@pytest.mark.parametrize(
    ("preset", "options", "text"),
    [
        ("w4a8", SERVED, "14 of 14 projections are written without the static encoding of their input"),
        ("w4a8", ALL, "vLLM has no kernel for 14 of 14 projections"),
        ("w4a8-asym", SERVED, "vLLM has no kernel for 14 of 14 projections"),
        ("w8a8", SERVED, ""),
    ],
)
def test_the_warning_says_what_was_left_out(checkpoint, tmp_path, caplog, monkeypatch, preset, options, text):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    export_compressed_tensors(checkpoint("llama-gqa", preset), tmp_path, options)
    assert text in caplog.text and bool(text) == bool(caplog.text)


def test_tokenizer_and_generation_config_come_along_but_no_other_method(checkpoint, tmp_path):
    source = checkpoint("stablelm")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "README.md"):
        (source / name).write_text("{}")
    export_compressed_tensors(source, tmp_path, SERVED)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    text = (tmp_path / "config.json").read_text()
    assert "mobilequant" not in text
    assert json.loads(text)["dtype"] == "float32"


def test_pieces_and_shards_make_the_same_tensors(checkpoint, tmp_path, monkeypatch):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir()
    pieces.mkdir()
    export_compressed_tensors(checkpoint(), whole, SERVED)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(module, "write_weights", lambda out, entries: write_weights(out, entries, shard_bytes=20_000))
    export_compressed_tensors(checkpoint(), pieces, SERVED)
    shards = sorted(pieces.glob("*.safetensors"))
    assert len(shards) > 2
    together = {key: value for shard in shards for key, value in load_file(shard).items()}
    expected = load_file(whole / "model.safetensors")
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[key], value) for key, value in expected.items())
    assert torch.equal(tiny.logits_of(read(pieces)), tiny.logits_of(read(whole)))


def test_tensors_start_at_multiples_of_their_size(checkpoint, tmp_path):
    export_compressed_tensors(checkpoint("qwen3", "w8a16"), tmp_path, ALL)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"I64": 8, "F32": 4, "I32": 4, "I16": 2, "I8": 1}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(header)


@pytest.mark.parametrize("values", [torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 2), torch.ones(3, 3)])
def test_values_that_are_not_as_announced_are_refused(tmp_path, values):
    with pytest.raises(RuntimeError, match="^x yields"):
        write_weights(tmp_path, [Entry("x", torch.float32, (2, 3), lambda: [values])])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{DOWN}.weight._scale", torch.nan, "is not finite and positive"),
        (f"{DOWN}.input.scale", 0.0, "is not finite and positive"),
        (f"{DOWN}.input.zero_point", 300, "is 300, off its grid"),
    ],
)
def test_damaged_encodings_are_refused(checkpoint, tmp_path, key, value, message):
    folder, damaged, out = checkpoint("mistral"), tmp_path / "damaged", tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors[key].view(-1)[0] = value
    damaged.mkdir()
    out.mkdir()
    (damaged / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, damaged / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=f"{key} in the checkpoint {message}"):
        export_compressed_tensors(damaged, out, SERVED)
    assert not list(out.iterdir())


def test_other_models_are_refused(tmp_path):
    tiny.build("llama-gqa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a float model"):
        export_compressed_tensors(tmp_path, tmp_path, SERVED)
    (tmp_path / "quanto_qmap.json").write_text("{}")
    with pytest.raises(ValueError, match="is a quanto model; compressed-tensors is written from"):
        export_compressed_tensors(tmp_path, tmp_path, SERVED)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export_compressed_tensors(Path("nowhere"), tmp_path, SERVED)


def test_a_run_that_is_cut_leaves_no_config(checkpoint, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        export_compressed_tensors(checkpoint(), tmp_path, SERVED)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "config.json").exists()
