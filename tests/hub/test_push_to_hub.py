"""``model.push_to_hub()`` of transformers, and the base model that a run records."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
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


def test_the_card_of_transformers_carries_our_tags(saved, hub, store, fresh_api):
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO)
    assert card_of(store).data.tags == TAGS
    assert card_of(store).data.library_name == "transformers"


def test_a_full_card_on_the_hub_survives_push_to_hub(saved, hub, store, fresh_api):
    push(saved[0], REPO)
    full = store.repos[REPO].files["README.md"]
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO, tags=["mine"])
    assert card_of(store).text == ModelCard(full.decode()).text
    assert card_of(store).data.tags == [*TAGS, "mine"]


def test_push_replaces_the_empty_form_that_push_to_hub_left(saved, hub, store, fresh_api):
    AutoModelForCausalLM.from_pretrained(saved[0]).push_to_hub(REPO)
    assert "More Information Needed" in card_of(store).text
    push(saved[0], REPO)
    assert "More Information Needed" not in card_of(store).text
    assert "## How to load it" in card_of(store).text


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
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(saved[0])("Once upon a time", return_tensors="pt")
    here = AutoModelForCausalLM.from_pretrained(saved[0])(**inputs).logits
    assert json.loads(result.stdout.splitlines()[-1]) == here.tolist()
