"""Uploads to a loopback Hub with the real client, and what comes back from it.

The client is told to use LFS (``HF_HUB_DISABLE_XET``); uploads through xet storage need Hugging Face's own servers.
"""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from optimum_mobilequant.hub.push import push
from tests import tiny
from tests.hub.conftest import files_of
from tests.hub.loopback import Repo

REPO = "me/model-w4a8"


@pytest.mark.parametrize("part", [None, 7_000], ids=["one piece", "parts"])
def test_what_is_pushed_loads_with_the_same_logits(saved, hub, store, part):
    folder, logits = saved
    before, store.part = files_of(folder), part
    assert push(folder, REPO) == f"{hub.url}/{REPO}"
    repo = store.repos[REPO]
    assert set(repo.large) == {"model.safetensors"}  # one large file, the others in the commit itself
    assert {path: repo.files[path] for path in before} == before
    assert len(repo.commits) == 1
    assert set(repo.commits[0]["changed"]) == {*before, "README.md"}
    assert len(store.paths("PUT", "/store/")) == (1 if part is None else -(-len(before["model.safetensors"]) // part))
    assert files_of(folder) == before  # nothing is written into the checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(tiny.logits_of(loaded), logits)


def test_a_damaged_byte_on_the_way_back_is_noticed(saved, hub, store):
    """Negative control of the comparison above."""
    push(saved[0], REPO)
    data = bytearray(store.repos[REPO].files["model.safetensors"])
    data[-3000] ^= 1
    store.repos[REPO].files["model.safetensors"] = bytes(data)
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    assert not torch.equal(tiny.logits_of(loaded), saved[1])


def test_a_second_push_sends_only_what_changed(folder, hub, store):
    push(folder, REPO)
    uploads = len(store.paths("PUT", ""))
    (folder / "generation_config.json").write_text("{}")
    push(folder, REPO, commit_message="New settings")
    assert store.repos[REPO].commits[1] == {
        "summary": "New settings",
        "changed": ["generation_config.json"],
        "deleted": [],
    }
    assert len(store.paths("PUT", "")) == uploads


def test_shards_of_an_earlier_push_go_with_the_new_commit(folder, hub, store, tmp_path):
    """transformers would read a single file left from before rather than the new shards."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    push(folder, REPO)
    model.save_pretrained(tmp_path / "shards" / "s", max_shard_size="8KB")
    push(tmp_path / "shards" / "s", REPO)
    repo = store.repos[REPO]
    assert "model.safetensors" not in repo.files
    assert "model.safetensors.index.json" in repo.files
    assert repo.commits[1]["deleted"] == ["model.safetensors"]
    push(folder, REPO)
    assert [path for path in repo.files if path.endswith((".safetensors", "index.json"))] == ["model.safetensors"]


def test_hidden_files_stay_here(folder, hub, store):
    for name in (".env", ".cache/notes", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    push(folder, REPO)
    assert not [path for path in store.repos[REPO].files if path.startswith(".") and path != ".gitattributes"]


def export_of(folder, name="onnx-out", checkpoint="model-w4a8", **summary):
    out = folder.parent / name
    out.mkdir()
    record = {"target": "onnx", "checkpoint": checkpoint, "summary": {"nodes": 3, **summary}}
    (out / "export.json").write_text(json.dumps(record))
    (out / "prompt.onnx").write_bytes(b"o" * 12_000)
    return out


def test_exports_lie_in_a_folder_of_their_target(folder, hub, store, caplog):
    out = export_of(folder, checked="logits of 8 sequences equal to the simulation")
    push(folder, REPO, exports=[out])
    repo = store.repos[REPO]
    assert repo.files["onnx/prompt.onnx"] == b"o" * 12_000
    assert "| `onnx/` | onnx |" in repo.files["README.md"].decode()
    assert "logits of 8 sequences equal to the simulation" in repo.files["README.md"].decode()
    (out / "prompt.onnx").rename(out / "prompt-2.onnx")
    push(folder, REPO, exports=[out])
    assert "onnx/prompt.onnx" not in repo.files and "onnx/prompt-2.onnx" in repo.files
    assert "keeps exports of an earlier push" not in caplog.text
    push(folder, REPO)
    assert "onnx/prompt-2.onnx" in repo.files
    assert "keeps exports of an earlier push (onnx/export.json)" in caplog.text


def test_an_export_of_another_checkpoint_is_pointed_out(folder, hub, caplog):
    push(folder, REPO, exports=[export_of(folder, checkpoint="something-else")])
    assert "was made of 'something-else', not 'model-w4a8'" in caplog.text


def test_private(saved, hub, store):
    push(saved[0], REPO, private=True)
    assert store.repos[REPO].private
    store.repos["me/open"] = Repo()
    with pytest.raises(ValueError, match="me/open exists and is public: make it private in its settings"):
        push(saved[0], "me/open", private=True)
    assert store.repos["me/open"].commits == []


def test_a_repository_with_another_model_is_left_alone(saved, hub, store):
    store.repos[REPO] = Repo(files={"config.json": b'{"model_type": "llama"}', "model.safetensors": b"float"})
    with pytest.raises(ValueError, match=f"{REPO} holds another model, which a push would replace: give another name"):
        push(saved[0], REPO)
    assert store.repos[REPO].commits == []


# Cards


def test_a_card_in_the_folder_keeps_its_text(folder, hub, store):
    text = "\n# My model\n\nWith  my own\twords.\n"
    (folder / "README.md").write_text(f"---\nlicense: mit\ntags:\n- mine\n- w8a8\nextra: 1\n---{text}")
    push(folder, REPO)
    assert (folder / "README.md").read_text().startswith("---\nlicense: mit\ntags:\n- mine\n- w8a8")
    sent = store.repos[REPO].files["README.md"].decode()
    assert sent.endswith(f"---{text}")
    data = ModelCard(sent).data.to_dict()
    assert (data["license"], data["extra"], data["library_name"]) == ("mit", 1, "transformers")
    assert data["tags"] == ["mine", "mobilequant", "w4a8", "int4", "integer-only", "npu"]
    push(folder, REPO, license="apache-2.0")
    assert ModelCard(store.repos[REPO].files["README.md"].decode()).data.license == "apache-2.0"


def test_a_card_without_metadata_keeps_its_text(folder, hub, store):
    (folder / "README.md").write_text("# Only text\n")
    push(folder, REPO)
    assert store.repos[REPO].files["README.md"].decode().endswith("---\n# Only text\n")


def test_a_card_edited_on_the_hub_is_kept_and_a_generated_one_is_not(folder, hub, store):
    push(folder, REPO)
    repo = store.repos[REPO]
    generated = repo.files["README.md"]
    repo.files["README.md"] = generated.replace(b"## Use and limits", b"## Edited")
    push(folder, REPO)
    assert repo.files["README.md"] == generated
    own = "".join(line for line in generated.decode().splitlines(True) if not line.startswith("<!--")) + "\nMine.\n"
    repo.files["README.md"] = own.encode()
    push(folder, REPO)
    assert repo.files["README.md"].decode().endswith("\nMine.\n")


def test_a_card_that_cannot_be_read_stops_the_push_before_it_begins(folder, hub, store):
    (folder / "README.md").write_text("---\n- a list\n---\ntext")
    with pytest.raises(ValueError, match=r"the metadata of .*README.md cannot be read .*: correct or remove them"):
        push(folder, REPO)
    assert store.repos == {}


def test_licence_and_size_of_the_base_come_from_the_hub(saved, hub, store):
    card = b"---\nlicense: other\nlicense_name: small\nlicense_link: LICENSE\n---\n"
    store.repos["org/base"] = Repo(files={"README.md": card, "a.safetensors": b"0" * 4_000_000})
    push(saved[0], REPO, base_model="org/base")
    sent = ModelCard(store.repos[REPO].files["README.md"].decode())
    assert sent.data.base_model == "org/base"
    assert sent.data["base_model_relation"] == "quantized"
    assert sent.data.license == "other"
    assert sent.data.license_name == "small"
    assert sent.data.license_link == f"{hub.url}/org/base/blob/main/LICENSE"
    assert "| org/base, safetensors files | 4.0 MB |" in sent.text


def test_a_base_that_the_hub_does_not_show_is_only_a_warning(saved, hub, store, caplog):
    push(saved[0], REPO, base_model="org/none")
    assert ModelCard(store.repos[REPO].files["README.md"].decode()).data.base_model == "org/none"
    assert "the Hub tells nothing about org/none" in caplog.text
    assert "give --license" in caplog.text
