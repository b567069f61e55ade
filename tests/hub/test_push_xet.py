"""Large files through xet storage: the real xet client, told to keep its blocks in a folder of this machine."""

import hashlib

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from optimum_mobilequant.hub.push import push
from tests import tiny
from tests.hub.conftest import files_of
from tests.hub.loopback import WRITER

hf_xet = pytest.importorskip("hf_xet", reason="the client takes LFS where hf_xet is not installed")
REPO = "me/model-w4a8"


@pytest.fixture
def xet(saved, hub, store, monkeypatch, tmp_path):
    """The folder of the blocks."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")  # by default it waits for minutes
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    weights = saved[0] / "model.safetensors"
    (about,) = hf_xet.hash_files([str(weights)])
    store.known[hashlib.sha256(weights.read_bytes()).hexdigest()] = (about.hash, weights.read_bytes())
    store.xet = f"local://{tmp_path / 'blocks'}"
    return tmp_path / "blocks"


def test_what_is_pushed_through_xet_loads_with_the_same_logits(saved, xet, hub, store, caplog):
    caplog.set_level("DEBUG")
    push(saved[0], REPO)
    assert sum(map(len, files_of(xet).values())) > 0
    assert len(store.paths("GET", "xet-write-token")) == 1 and not store.paths("POST", "lfs/objects")
    assert len(store.repos[REPO].commits) == 1 and set(store.repos[REPO].large) == {"model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(tiny.logits_of(loaded), saved[1])
    assert store.paths("GET", "xet-read-token") and not store.paths("GET", "/resolve/.*/model.safetensors")
    assert WRITER not in caplog.text
    assert not [data for data in files_of(xet.parent).values() if WRITER.encode() in data]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [(500, ConnectionError, "was interrupted .*Push again"), (403, PermissionError, r"may not write to .* \(403\)")],
)
def test_a_refusal_in_the_middle_publishes_nothing_and_can_be_repeated(saved, xet, hub, store, status, kind, message):
    store.fault = lambda method, path: status if "xet-write-token" in path else None
    with pytest.raises(kind, match=message) as caught:
        push(saved[0], REPO)
    assert WRITER not in str(caught.value) and store.repos[REPO].commits == []
    store.fault = None
    push(saved[0], REPO)
    assert len(store.repos[REPO].commits) == 1
