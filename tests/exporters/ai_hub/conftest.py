"""A stand-in service, a configuration that leads to it, and small ``.aimet`` folders."""

import json
import random

import pytest

CONTEXT, PROMPT = 8, 4


@pytest.fixture(autouse=True)
def _no_real_account(monkeypatch, tmp_path):
    """Whatever account this machine has is out of reach."""
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "none.ini"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def service():
    pytest.importorskip("qai_hub", reason='no client of AI Hub: pip install "optimum-mobilequant[ai-hub]"')
    from tests.exporters.ai_hub.server import serving
    from tests.exporters.ai_hub.service import Service

    with serving(Service()) as running:
        yield running


@pytest.fixture
def configure(monkeypatch, tmp_path):
    def write(url, token="a-secret-token-of-the-tests"):
        path = tmp_path / "client.ini"
        path.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\nverbose = True\n")
        monkeypatch.setenv("QAIHUB_CLIENT_INI", str(path))
        return path

    return write


@pytest.fixture
def hub(service, configure):
    from optimum_mobilequant.exporters.ai_hub import access

    configure(service.url)
    return access.connect(access.read_config())


@pytest.fixture
def phone(hub):
    return hub.find_device("Samsung Galaxy S24 (Family)")


@pytest.fixture
def short_retries(monkeypatch):
    """The client's own retries take 46 s."""
    import qai_hub.util.session as session

    monkeypatch.setattr(session, "MAX_RETRIES", 1)
    monkeypatch.setattr(session, "BACKOFF_FACTOR", 0.01)


def tensor(name, shape, dtype, scale=None, zero_point=None):
    return {"name": name, "shape": shape, "dtype": dtype, "scale": scale, "zero_point": zero_point}


def io_of(new):
    past = CONTEXT - new
    inputs = [
        tensor("input_ids", [1, new], "int32"),
        tensor("attention_mask", [1, 1, new, CONTEXT], "uint16", 50 / 65535, 65535),
        tensor("position_ids_cos", [1, 1, new, 2], "int16", 2**-14, 0),
        tensor("position_ids_sin", [1, 1, new, 2], "int16", 2**-14, 0),
        tensor("past_key_0_in", [2, 1, 4, past], "uint8", 0.1, 128),
        tensor("past_value_0_in", [2, 1, past, 4], "uint8", 0.1, 120),
    ]
    return {"inputs": inputs, "outputs": [tensor("logits", [1, new, 8], "uint16", 1e-3, 30000)]}


@pytest.fixture
def aimet(tmp_path):
    """A folder as the qnn target writes it; the files' bytes mean nothing to the service."""
    folder = tmp_path / "aimet"
    names = {f"prompt_ar{PROMPT}_cl{CONTEXT}": PROMPT, f"token_ar1_cl{CONTEXT}": 1}
    for name in names:
        (folder / f"{name}.aimet").mkdir(parents=True)
        for suffix, size in ((".onnx", 300), (".data", 5000), (".encodings", 200)):
            (folder / f"{name}.aimet" / f"model{suffix}").write_bytes(random.Random(name + suffix).randbytes(size))
    spec = {"format_version": 1, "context": CONTEXT, "prompt_length": PROMPT}
    spec["graphs"] = {name: io_of(new) for name, new in names.items()}
    (folder / "io_spec.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
