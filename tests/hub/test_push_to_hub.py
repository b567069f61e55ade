"""``model.push_to_hub()`` of transformers, and the base model that a run records."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as transformers_hub

from optimum_mobilequant import quantize
from optimum_mobilequant.hub.push import push
from tests import tiny
from tests.hub.loopback import WRITER, Repo

REPO = "me/model-w4a8"
TAGS = ["mobilequant", "w4a8", "int4", "integer-only", "npu"]


@pytest.fixture
def fresh_api(monkeypatch):
    """transformers keeps one client, with the address of its first use."""
    monkeypatch.setattr(transformers_hub, "_hf_api", None)


def card_of(store):
    return ModelCard(store.repos[REPO].files["README.md"].decode())


def test_push_to_hub_leaves_the_full_card_in_its_one_commit(saved, hub, store, fresh_api):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    model.push_to_hub(REPO, tags=["mine"], private=True, commit_message="Mine")
    (commit,) = store.repos[REPO].commits
    assert commit["summary"] == "Mine" and set(commit["changed"]) >= {"README.md", "config.json", "model.safetensors"}
    assert set(store.repos[REPO].large) == {"model.safetensors"} and store.repos[REPO].private
    card = card_of(store)
    assert "More Information Needed" not in card.text and "## Scores" in card.text
    assert set(card.data.tags) == {*TAGS, "mine"} and card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_type == "perplexity"
    assert "AutoTokenizer" not in card.text  # there is none yet
    assert torch.equal(tiny.logits_of(AutoModelForCausalLM.from_pretrained(REPO)), saved[1])


def test_after_the_tokenizer_the_snippet_uses_it(saved, hub, store, fresh_api):
    AutoTokenizer.from_pretrained(saved[0]).push_to_hub(REPO)
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO)
    assert "tokenizer = AutoTokenizer" in card_of(store).text


def test_saving_with_push_to_hub_leaves_the_same_card(saved, hub, store, fresh_api, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved[0]).save_pretrained(tmp_path / "m", push_to_hub=True, repo_id=REPO)
    assert "## How to load it" in card_of(store).text
    assert (tmp_path / "m" / "README.md").read_bytes() == store.repos[REPO].files["README.md"]


def test_what_an_earlier_push_was_told_is_kept(saved, hub, store, fresh_api):
    store.repos["org/base"] = Repo(files={"README.md": b"---\nlicense: mit\n---\n"})
    push(saved[0], REPO, base_model="org/base", license="apache-2.0")
    before = store.repos[REPO].files["README.md"]
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO)
    assert store.repos[REPO].files["README.md"] == before
    assert (card_of(store).data.base_model, card_of(store).data.license) == ("org/base", "apache-2.0")


def test_a_card_that_somebody_wrote_keeps_its_text(saved, hub, store, fresh_api):
    store.repos[REPO] = Repo(files={"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO)
    assert card_of(store).text == "# Mine\n"
    assert card_of(store).data.license == "mit" and set(card_of(store).data.tags) == set(TAGS)
    assert card_of(store).data.eval_results[0].metric_type == "perplexity"


def test_push_replaces_the_card_that_push_to_hub_left(saved, hub, store, fresh_api):
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO)
    push(saved[0], REPO)
    assert "tokenizer = AutoTokenizer" in card_of(store).text


def test_push_to_hub_of_a_model_in_memory_and_of_its_copy(hub, store, fresh_api):
    model = quantize(tiny.build("llama-gqa"), None, tiny.config("w4a8"))
    copy.deepcopy(model).push_to_hub(REPO)
    assert "## Scores" in card_of(store).text
    assert torch.equal(tiny.logits_of(AutoModelForCausalLM.from_pretrained(REPO)), tiny.logits_of(model))


def test_a_float_model_gets_the_form_of_transformers(hub, store, fresh_api):
    model = quantize(tiny.build("llama-gqa"), None, tiny.config("w4a8"))
    model.dequantize()
    model.push_to_hub(REPO)
    assert "More Information Needed" in card_of(store).text  # nothing of ours is left on it


def test_no_token_stays_behind(saved, hub, store, fresh_api, caplog, tmp_path):
    caplog.set_level("DEBUG")
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO, token=WRITER)
    assert WRITER in store.tokens_seen and WRITER not in caplog.text
    assert not [data for data in store.repos[REPO].files.values() if WRITER.encode() in data]


def test_tags_follow_the_model_through_its_life():
    model = tiny.build("llama-gqa")
    model.add_model_tags(["mine"])
    quantize(model, None, tiny.config("w8a8"))
    assert model.model_tags == ["mine", "mobilequant", "w8a8", "int8", "integer-only", "npu"]
    model.dequantize()
    assert model.model_tags == ["mine"]
    assert tiny.build("llama-gqa").model_tags is None  # the class is not touched


def test_the_base_model_is_recorded_if_it_came_from_the_hub(hub, store, tmp_path):
    tiny.build("llama-gqa").save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    store.repos["org/base"] = Repo(files=files | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    model = quantize(AutoModelForCausalLM.from_pretrained("org/base"), None, tiny.config("w4a8"))
    assert model.config.quantization_config.recorded["base_model"] == "org/base"
    model.save_pretrained(tmp_path / "model-w4a8")
    push(tmp_path / "model-w4a8", REPO)
    data = card_of(store).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (
        "org/base",
        "quantized",
        "apache-2.0",
    )


def test_the_folder_of_a_base_model_is_not_recorded(tmp_path):
    tiny.build("llama-gqa").save_pretrained(tmp_path / "base")
    model = quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), None, tiny.config("w4a8"))
    assert model.config.quantization_config.recorded["base_model"] is None
    assert str(tmp_path) not in json.dumps(model.config.quantization_config.to_dict())


def test_the_snippet_of_the_card_runs_in_a_fresh_process(saved, hub, store, tmp_path):
    """With the settings a user has: environment variables only."""
    push(saved[0], REPO)
    code = re.search(r"```python\n(.*?)```", card_of(store).text, re.DOTALL)[1]
    code += "\nimport json\nprint(json.dumps(model(**inputs).logits.tolist()))"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "HF_TOKEN": WRITER}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    inputs = AutoTokenizer.from_pretrained(saved[0])("Once upon a time", return_tensors="pt")
    here = AutoModelForCausalLM.from_pretrained(saved[0])(**inputs).logits
    assert json.loads(result.stdout.splitlines()[-1]) == here.tolist()
