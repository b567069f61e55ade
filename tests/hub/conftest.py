"""A saved checkpoint with a tokenizer, and a loopback Hub that this process's client talks to."""

import time

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import quantize
from tests import tiny
from tests.hub.loopback import WRITER, Hub, Store


def save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: tiny.VOCAB - 3]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(folder, its model's logits); not to be changed."""
    folder = tmp_path_factory.mktemp("hub") / "model-w4a8"
    model = quantize(tiny.build("llama-gqa"), None, tiny.config("w4a8"))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder, tiny.logits_of(model)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to change."""
    import shutil

    return shutil.copytree(saved[0], tmp_path / saved[0].name)


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Point the client at an address: online, without xet, a cache and a login of its own, no waiting."""
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def connect(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return connect


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def hub(store, client, monkeypatch):
    """A running Hub; the token of this machine may write."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with Hub(store) as server:
        client(server.url)
        yield server
