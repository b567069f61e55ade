"""A checkpoint in the hands of transformers, accelerate and peft: what works as with any model, what is refused."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from optimum_mobilequant import MobileQuantConfig, cli, inspect_checkpoint, quantize, set_backend
from optimum_mobilequant.bench.runners import resident_bytes
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = [{"role": "user", "content": "dog"}]


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A float model as chat models come: with a template and its own way of sampling."""
    folder = tmp_path_factory.mktemp("native") / "base"
    model = tiny.build("llama-gqa", vocab_size=259)
    model.generation_config.update(temperature=0.7, top_k=5, do_sample=True, max_new_tokens=6)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(base):
    (base.parent / "calib.txt").write_text("A small dog met a cat and they went home. " * 60)
    out = base.parent / "out"
    options = ["--recipe", "rtn", "--effort", "none", "--set", "samples=8", "--set", "seq_len=16"]
    argv = ["quantize", str(base), "--preset", "w4a8", "--dataset", str(base.parent / "calib.txt")]
    assert cli.main([*argv, "--out", str(out), *options]) == 0
    return out


def memory_model(preset="w4a8", **changes):
    return quantize(tiny.build("llama-gqa", **changes), None, tiny.config(preset))


def test_pipeline_writes_what_generate_writes(out):
    write = pipeline("text-generation", model=str(out))
    text = write("dog", do_sample=False, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    model, tokens = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokens("dog", return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert text == tokens.decode(ids, skip_special_tokens=True) and len(ids) == 5
    assert write.model.hf_quantizer.quantization_config.preset == "w4a8"


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(out, device_map):
    expected = tiny.logits_of(AutoModelForCausalLM.from_pretrained(out))
    placed = AutoModelForCausalLM.from_pretrained(out, device_map=device_map)
    assert torch.equal(tiny.logits_of(placed, tiny.probe_ids().to(placed.device)).cpu(), expected)


def test_chat_template_and_generation_config_are_kept(base, out):
    there = AutoTokenizer.from_pretrained(out)
    assert there.chat_template == TEMPLATE
    assert there.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == "<user>dog<bot>"
    written = [json.loads((folder / "generation_config.json").read_text()) for folder in (base, out)]
    assert written[0] == written[1] and written[1]["temperature"] == 0.7
    answer = pipeline("text-generation", model=str(out))(CHAT, max_new_tokens=4)[0]["generated_text"]
    assert answer[0] == CHAT[0] and answer[1]["role"] == "assistant"


def test_saved_again_after_generating_it_is_the_same_checkpoint(out, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(out)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    model.save_pretrained(tmp_path / "again")
    again, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", out))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    name = "generation_config.json"
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "again", out)]
    assert len({config.pop("_name_or_path") for config in configs}) == 2 and configs[0] == configs[1]


def test_configs_and_tokenizers_load_by_themselves(base, out):
    assert AutoConfig.from_pretrained(out).quantization_config["preset"] == "w4a8"
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


# Memory


@pytest.mark.parametrize("backend", ["simulate", "auto", "reference"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_the_memory_footprint_is_that_of_the_integers(preset, backend):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    before = tiny.build("llama-gqa", **sizes).get_memory_footprint()
    model = memory_model(preset, **sizes)
    set_backend(model, backend)
    tiny.logits_of(model)
    held = resident_bytes(model)  # counts storages, so a tensor that is a view of more memory shows
    assert held * 0.99 <= model.get_memory_footprint() <= held
    assert model.get_memory_footprint() < before * 0.35  # float32: a quarter for 8 bits, and constants of kernels


def test_accelerate_estimates_the_float_model(saved_on_hub):
    """It builds the architecture from the config: its float rows are right, and "int8" means 1 byte a parameter."""
    from accelerate.commands.estimate import gather_data

    repo, folder = saved_on_hub
    arguments = type("Arguments", (), {})()
    arguments.model_name, arguments.library_name, arguments.trust_remote_code = repo, None, False
    arguments.dtypes = ["float32", "int8", "int4"]
    sizes = {row[0]: row[2] for row in gather_data(arguments)}
    parameters = inspect_checkpoint(folder).totals["parameters"]
    head = tiny.VOCAB * 32  # accelerate builds AutoModel, which has none
    assert sizes["float32"] == pytest.approx(4 * (parameters - head), rel=1e-3)  # and some rotary frequencies
    assert sizes["int8"] == sizes["float32"] / 4 and sizes["int4"] == sizes["float32"] / 8


@pytest.fixture
def saved_on_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from tests.hub.loopback import Hub, Repo, Store

    folder = tmp_path / "m"
    memory_model("w8a8").save_pretrained(folder)
    store = Store()
    store.repos["me/m"] = Repo(files={path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub(store) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)  # of the functions that accelerate calls
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield "me/m", folder


# Training


def test_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(memory_model(), TrainingArguments(tmp_path, use_cpu=True), train_dataset=[{"input_ids": [1]}])


def test_train_mode_is_not_entered(caplog):
    model = memory_model()
    around = torch.nn.ModuleDict({"teacher": model})
    around.train()
    assert around.training and not any(module.training for module in model.modules())
    assert "cannot be trained" in caplog.text and "model.dequantize()" in caplog.text
    caplog.clear()
    model.eval()
    assert caplog.text == ""
    assert model.dequantize().train().training


def test_a_model_that_was_in_train_mode_is_quantized_into_eval_mode(caplog):
    caplog.set_level(logging.WARNING)
    model = quantize(tiny.build("llama-gqa").train(), None, tiny.config())
    assert not model.training and caplog.text == ""


# Adapters

NO_ADAPTERS = r"takes no adapters.*Call model.dequantize\(\) first"


def test_add_adapter_is_refused_and_leaves_the_model_savable(tmp_path):
    peft = pytest.importorskip("peft")
    model = memory_model()
    expected = tiny.logits_of(model)
    with pytest.raises(ValueError, match=NO_ADAPTERS):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=NO_ADAPTERS):
        model.load_adapter(str(tmp_path))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(tiny.logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "down_proj"]])
def test_get_peft_model_is_refused_and_leaves_the_model_whole(targets):
    peft = pytest.importorskip("peft")
    model = memory_model()
    expected = tiny.logits_of(model)
    with pytest.raises(ValueError, match=NO_ADAPTERS):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    assert torch.equal(tiny.logits_of(model), expected)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_the_way_the_refusal_names_works():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(memory_model().dequantize(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = tiny.probe_ids()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    model = quantize(merged, None, tiny.config("w4a8"))
    assert model.quantization_method == "mobilequant" and isinstance(
        model.hf_quantizer.quantization_config, MobileQuantConfig
    )
