"""Genie bundles: their configuration, and what libGenie computes from them on the HTP emulator."""

import functools
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.exporters import phone

phone.require_emulator()

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from optimum_mobilequant.exporters import export, genie_config  # noqa: E402
from optimum_mobilequant.exporters.genie_runner import generate  # noqa: E402
from optimum_mobilequant.exporters.htp import HtpRunner, open_for_htp  # noqa: E402

CONTEXT, CHUNK = 64, 16
_FOLDER = tempfile.TemporaryDirectory(prefix="genie-tests-")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": ("llama-gqa", None),
    "linear": ("llama-gqa", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}),
    "llama3": ("llama-gqa", LLAMA3),
    "yarn": ("llama-gqa", YARN),
    "yarn with a factor of its own": ("llama-gqa", YARN | {"attention_factor": 1.25}),
    "partial": ("stablelm", None),
}
SIZE = len(phone.byte_tokenizer())


@functools.cache
def rope_checkpoint(name):
    variant, rope = ROPES[name]
    if rope is None:
        return phone.checkpoint(variant)
    return phone.save(tiny.build(variant, vocab_size=SIZE, rope_parameters=rope))


def export_to(checkpoint, **options):
    out = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "bundle"
    return export(checkpoint, "genie", out, **{"context": CONTEXT, "prompt_length": CHUNK, **options}).path


@functools.cache
def bundle(checkpoint):
    return export_to(checkpoint)


def read(folder, name="genie_config.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def dumped(folder, pattern, dtype, shape):
    """Genie's dumps of one tensor, in the order of the calls."""
    files = sorted(folder.rglob(pattern), key=lambda file: file.name)
    return [
        found.reshape(shape) for found in (np.fromfile(file, dtype) for file in files) if found.size == np.prod(shape)
    ]


def test_a_bundle_is_complete_and_says_what_it_is():
    folder = bundle(phone.checkpoint())
    names = {file.name for file in folder.iterdir()}
    configs = {"genie_config.json", "genie_config_shared.json"}
    extensions = {"htp_backend_ext_config.json", "htp_backend_ext_config_shared.json"}
    assert names == configs | extensions | {
        "prompt.bin", "token.bin", "shared.bin", "tokenizer.json", "tokenizer_config.json", "metadata.json",
        "README.md", "export.json",
    }  # fmt: skip
    for name in configs:
        config = read(folder, name)["dialog"]
        assert {*config["engine"]["model"]["binary"]["ctx-bins"], config["tokenizer"]["path"]} <= names
        assert config["engine"]["backend"]["extensions"] in names
    about = read(folder, "metadata.json")
    for name, binary in about["binaries"].items():
        assert binary["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert "only a phone" in about["binaries"]["shared.bin"]["checked"]
    assert [read(folder, name)["context"]["weight_sharing_enabled"] for name in sorted(extensions)] == [False, True]
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "None of the commands below was run" in page and "libQnnHtpV75Skel.so" in page


def test_the_configuration_states_the_models_own_facts():
    folder = bundle(phone.checkpoint())
    dialog = read(folder)["dialog"]
    assert dialog["context"] == {
        "version": 1, "size": CONTEXT, "n-vocab": SIZE, "bos-token": -1, "eos-token": 2, "pad-token": 2,
    }  # fmt: skip
    htp = dialog["engine"]["backend"]["QnnHtp"]
    assert (htp["kv-dim"], htp["pos-id-dim"], htp["rope-theta"]) == (8, 4, 10000)
    (device,) = read(folder, "htp_backend_ext_config.json")["devices"]
    assert (device["soc_model"], device["dsp_arch"]) == (57, "v75")


def test_chips_without_shared_weights_get_no_shared_binary():
    folder = export_to(phone.checkpoint(), soc="SM8450")
    assert not list(folder.glob("*shared*")) and "shared" not in (folder / "README.md").read_text(encoding="utf-8")
    assert read(folder, "metadata.json")["soc"] == {"name": "sm8450", "soc_model": 36, "dsp_arch": "v69"}


@pytest.mark.parametrize("name", ROPES)
def test_genie_computes_the_rotary_tables_of_the_model(name, tmp_path):
    checkpoint = rope_checkpoint(name)
    generate(bundle(checkpoint), [5, 6, 7], tokens=1, dump=tmp_path)
    source = open_for_htp(checkpoint)
    half = source.graph.facts["rotary_dims"] // 2
    for part, table in zip(("cos", "sin"), source.rotary_tables(CONTEXT), strict=True):
        (found,) = dumped(tmp_path, f"position_ids_{part}.u16.dat", np.uint16, (CONTEXT, half))
        encoding = source.graph.values["position_cos"].encoding
        expected = torch.round(table / encoding.scale).numpy() + 2**15
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_tables_differ_between_kinds(tmp_path):
    # so the comparison above can fail
    tables = [
        open_for_htp(rope_checkpoint(name)).rotary_tables(CONTEXT)[0] for name in ("default", "linear", "llama3")
    ]
    assert all((a - b).abs().max() > 0.01 for a, b in zip(tables, tables[1:], strict=False))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_genie_reads_the_tokens_that_the_tokenizer_makes(adds_bos, tmp_path):
    checkpoint = phone.checkpoint(adds_bos=adds_bos)
    prompt = "A prompt of two chunks."
    generate(bundle(checkpoint), prompt, tokens=1, dump=tmp_path)
    expected = AutoTokenizer.from_pretrained(checkpoint)(prompt)["input_ids"]
    calls = dumped(tmp_path, "*_in_input_ids", np.int32, (CHUNK,))
    assert np.concatenate(calls)[: len(expected)].tolist() == expected
    assert (expected[0] == 1) is adds_bos
    # the mask: the highest code is visible, the lowest hidden, whatever the encoding
    masks = dumped(tmp_path, "*_in_attention_mask", np.uint16, (CHUNK, CONTEXT))
    assert all(set(np.unique(mask)) == {0, 65535} for mask in masks)
    assert (masks[1][0] == 65535).sum() == CHUNK + 1


def test_text_and_ids_are_continued_alike():
    checkpoint = phone.demo_checkpoint("w8a16")
    folder = bundle(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = "import os\nimport sys\n\n\ndef main(arguments):\n    "
    by_ids = generate(folder, tokenizer(prompt)["input_ids"], tokens=6)
    by_text = generate(folder, prompt, tokens=6)
    assert len(by_ids.ids) == 6 and by_ids.ended == by_text.ended == "ended"
    assert by_text.text == by_ids.text == tokenizer.decode(by_ids.ids)


def test_genie_generates_what_the_simulation_does():
    """64 tokens after a prompt of 40 (three chunks): at each step the simulation reads what Genie wrote so far."""
    checkpoint = phone.demo_checkpoint("w8a16")
    folder = export_to(checkpoint, context=128)
    prompt = AutoTokenizer.from_pretrained(checkpoint)(Path(tempfile.__file__).read_text(encoding="utf-8"))
    prompt = prompt["input_ids"][:40]
    found = generate(folder, prompt, tokens=64)
    assert len(found.ids) == 64
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + found.ids])).logits[0]
    expected = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
    assert np.mean(np.array(expected) == found.ids) >= 0.95
    assert np.mean(np.array(expected[1:]) == found.ids[:-1]) < 0.5  # shifted by one, nothing fits


@pytest.mark.parametrize(("preset", "key_shift"), [("w8a8", False), ("w8a16", True)])
def test_genie_computes_what_the_session_of_the_same_graph_computes(preset, key_shift):
    checkpoint = phone.demo_checkpoint(preset, key_shift=key_shift)
    prompt = list(range(300, 340))
    found = generate(export_to(checkpoint), prompt, tokens=12).ids
    runner = HtpRunner(checkpoint, context=CONTEXT, prompt_length=CHUNK)
    logits = runner(torch.tensor([prompt + found]))[0]
    expected = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
    # the tables of the rotation may be one code apart
    assert np.mean(np.array(expected) == found) >= 0.9


def test_a_full_context_and_bad_prompts():
    folder = bundle(phone.checkpoint())
    assert generate(folder, list(range(5, 5 + CONTEXT + 10)), tokens=4).ended == "context full"
    for prompt, tokens in (("", 4), ("x", 0), ([], 1)):
        with pytest.raises(ValueError, match="at least one token"):
            generate(folder, prompt, tokens=tokens)
    with pytest.raises(ValueError, match="token ids must lie"):
        generate(folder, [SIZE], tokens=1)
    with pytest.raises(FileNotFoundError, match="genie_config.json"):
        generate(folder.parent, "x", tokens=1)


def test_what_genie_says_about_a_damaged_bundle_is_in_the_error(tmp_path):
    import shutil

    folder = shutil.copytree(bundle(phone.checkpoint()), tmp_path / "damaged")
    (folder / "prompt.bin").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="while loading the bundle"):
        generate(folder, "x", tokens=1)


@pytest.fixture
def opened():
    return open_for_htp(phone.checkpoint())


def test_models_that_genie_cannot_imitate_are_refused(opened, tmp_path):
    model, facts = opened.model, opened.graph.facts
    for rope, words in (
        ({"rope_type": "longrope", "rope_theta": 1e4}, "no rotary embedding of type"),
        ({"rope_type": "default", "rope_theta": 1234.5}, "no whole number"),
        (YARN | {"mscale": 0.7}, "mscale"),
    ):
        model.config.rope_parameters = rope
        with pytest.raises(ValueError, match=words):
            genie_config.rope_settings(model, facts)
    with pytest.raises(ValueError, match="no tokenizer.json"):
        genie_config.read_vocabulary(tmp_path, model)
    phone.byte_tokenizer(adds_eos=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adds no other"):
        genie_config.read_vocabulary(tmp_path, model)


def test_special_tokens(opened, tmp_path):
    phone.byte_tokenizer().save_pretrained(tmp_path)
    model = opened.model
    model.generation_config.eos_token_id = [2, 5]
    assert genie_config.read_vocabulary(tmp_path, model) == genie_config.Vocabulary(None, (2, 5), 2)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.config.pad_token_id = -1
    assert genie_config.read_vocabulary(tmp_path, model) == genie_config.Vocabulary(None, (), 0)
    config = genie_config.genie_config(
        opened.graph.facts,
        genie_config.Vocabulary(None, (), 0),
        ({}, {}),
        context=8,
        binaries=["a"],
        extensions="b",
        sampling={},
    )
    assert (config["dialog"]["context"]["eos-token"], config["dialog"]["context"]["pad-token"]) == (-1, 0)
    model.generation_config.eos_token_id = SIZE
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        genie_config.read_vocabulary(tmp_path, model)


def test_the_models_own_sampling_is_kept(tmp_path):
    assert genie_config.sampler(tmp_path)["greedy"] is True
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_p": 0.9}')
    assert genie_config.sampler(tmp_path) == {"seed": 42, "temp": 0.7, "top-k": 50, "top-p": 0.9}


def test_an_unknown_chip_or_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="sm8650"):
        export(phone.checkpoint(), "genie", tmp_path / "out", soc="sm1", context=CONTEXT, prompt_length=CHUNK)

    def fail(*arguments, **more):
        raise RuntimeError("stopped")

    monkeypatch.setattr("optimum_mobilequant.exporters.genie.check_reload", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        export(phone.checkpoint(), "genie", tmp_path / "out", context=CONTEXT, prompt_length=CHUNK)
    assert list(tmp_path.iterdir()) == []
