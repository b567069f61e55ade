"""Pushes that must fail, or that are interrupted: one clear error, nothing published, no token shown."""

import logging
import traceback

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant.hub.push import push
from tests import tiny
from tests.hub.conftest import files_of
from tests.hub.loopback import READER, WRITER, Hub, Repo

REPO = "me/model-w4a8"
OTHER = "hf_" + "X" * 34  # a token that no server knows


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/bad name", "me/a--b", "", "me/.x", "me/" + "x" * 97])
def test_bad_names(saved, hub, store, name):
    with pytest.raises(ValueError, match="is no Hub id: give owner/name"):
        push(saved[0], name)
    assert store.requests == []


def test_the_base_itself_is_not_overwritten(saved, hub, store):
    with pytest.raises(ValueError, match="is the base model itself"):
        push(saved[0], REPO, base_model=REPO)
    assert store.requests == []


def test_damaged_and_foreign_checkpoints(folder, hub, store, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is a float model, not a mobilequant checkpoint"):
        push(tmp_path / "float", REPO)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        push(tmp_path / "none", REPO)
    with pytest.raises(ValueError, match="holds no finished export"):
        push(folder, REPO, exports=[tmp_path])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        push(folder, REPO)
    assert store.requests == []


def test_no_token(saved, hub, store, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="no token for the Hub: run `hf auth login`, or set HF_TOKEN"):
        push(saved[0], REPO)
    assert store.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (OTHER, r"the Hub does not accept this token \(401\): run `hf auth login`"),
        (READER, rf"this token may not write to {REPO} \(403\): use a token with write access"),
        (f"{WRITER}\nsecond", "the token holds characters that no token has"),
        (f"{WRITER}é", "the token holds characters that no token has"),
    ],
    ids=["unknown", "read only", "two lines", "not ASCII"],
)
def test_refused_tokens_are_in_no_message(saved, hub, store, token, message, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PermissionError, match=message) as caught:
        push(saved[0], REPO, token=token)
    shown = caplog.text + "".join(traceback.format_exception(caught.value))
    assert token not in shown and WRITER not in shown
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    assert REPO not in store.repos


def test_a_reader_may_not_write_to_a_repository_that_exists(saved, hub, store):
    store.repos[REPO] = Repo()
    with pytest.raises(PermissionError, match=rf"may not write to {REPO} \(403\)"):
        push(saved[0], REPO, token=READER)
    assert store.repos[REPO].commits == []


def test_a_token_lands_in_no_file_and_no_log(saved, hub, store, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    push(saved[0], REPO, token=f" {WRITER}\n")
    assert WRITER in store.tokens_seen  # it was sent
    assert WRITER not in caplog.text
    everything = [*files_of(tmp_path).values(), *files_of(saved[0]).values(), *store.repos[REPO].files.values()]
    assert not [data for data in everything if WRITER.encode() in data]


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_server_that_refuses_and_sends_the_token_back(saved, hub, store, status, where):
    store.fault = lambda method, path: status if where in path else None
    kind, message = (ConnectionError, "interrupted") if status == 500 else (ValueError, rf"refused .* \({status}\)")
    with pytest.raises(kind, match=message) as caught:
        push(saved[0], REPO)
    assert WRITER not in "".join(traceback.format_exception(caught.value))
    assert "hf_***" in str(caught.value)


def test_metadata_that_the_hub_refuses(folder, hub, store):
    (folder / "README.md").write_text("---\nlicense: [a, b]\n---\ntext")
    with pytest.raises(ValueError, match='refused .*"license" must be a string'):
        push(folder, REPO)
    assert store.repos[REPO].commits == []


def test_an_interrupted_push_publishes_nothing_and_can_be_repeated(folder, client, store, monkeypatch):
    """The server dies in the second of two large files; another one with the same store takes its place."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.bin").write_bytes(b"n" * 30_000)
    logits = tiny.logits_of(AutoModelForCausalLM.from_pretrained(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    store.fault = lambda method, path: "die" if method == "PUT" and store.objects else None
    with Hub(store) as first:
        client(first.url)
        # One upload at a time, so that it is known which of the two arrived.
        monkeypatch.setattr("huggingface_hub._commit_api.ThreadPoolExecutor.__init__", _one_worker())
        with pytest.raises(ConnectionError, match="was interrupted .*Push again"):
            push(folder, REPO)
    assert store.repos[REPO].commits == []
    assert len(store.objects) == 1
    arrived = next(iter(store.objects))
    store.fault = None
    store.requests.clear()
    with Hub(store, port=first.port) as second:
        client(second.url)
        push(folder, REPO)
        assert len(store.repos[REPO].commits) == 1
        assert not store.paths("PUT", arrived) and len(store.paths("PUT", "/store/")) == 1
        assert torch.equal(tiny.logits_of(AutoModelForCausalLM.from_pretrained(REPO)), logits)


def _one_worker():
    from concurrent.futures import ThreadPoolExecutor

    original = ThreadPoolExecutor.__init__

    def start(self, max_workers=None, *args, **options):
        original(self, 1, *args, **options)

    return start


def test_an_upload_that_arrives_damaged_is_not_committed(saved, hub, store):
    """The verification after an upload answers 422; the push must not go on to the commit."""
    store.fault = lambda method, path: 422 if path.endswith("/verify") else None
    with pytest.raises(ConnectionError, match="was interrupted"):
        push(saved[0], REPO)
    assert store.repos[REPO].commits == []


def test_offline(saved, hub, store, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE forbids the upload: unset it"):
        push(saved[0], REPO)
    assert store.requests == []


def test_no_server(saved, hub, store, client):
    client("http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="was interrupted .*Push again"):
        push(saved[0], REPO)
