"""The account: configuration, reachability, token, device. Every error comes before anything is sent."""

import logging
import socket
import subprocess
import sys
import time

import pytest

from optimum_mobilequant.exporters.ai_hub import access
from tests import tiny

TOKEN = "a-secret-token-of-the-tests"


def test_no_configuration(monkeypatch):
    with pytest.raises(FileNotFoundError, match="not configured.*qai-hub configure --api_token"):
        access.read_config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[api]\napi_url = https://x\nweb_url = https://x\n", "lacks api_token"),
        (f"[api]\napi_token = {TOKEN}\n", "lacks api_url, web_url"),
        ("", "lacks api_token, api_url, web_url"),
        (f"[api]\napi_token = {TOKEN}\napi_url = workbench\nweb_url = x\n", "no address"),
        (f"[api\n{TOKEN}\n", "no ini file"),
    ],
)
def test_damaged_configuration(monkeypatch, tmp_path, text, expected):
    path = tmp_path / "bad.ini"
    path.write_text(text)
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(path))
    with pytest.raises(ValueError, match=f"{expected}.*qai-hub configure") as bad:
        access.read_config()
    assert str(path) in str(bad.value) and TOKEN not in str(bad.value)


def test_the_token_is_not_shown(configure):
    configure("https://example.org")
    config = access.read_config()
    assert config.api_token == TOKEN and TOKEN not in repr(config)


def refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "no answer", "no such name", "slow lookup"])
def test_a_host_out_of_reach_fails_within_five_seconds(configure, monkeypatch, kind):
    pytest.importorskip("qai_hub", reason='no client of AI Hub: pip install "optimum-mobilequant[ai-hub]"')
    monkeypatch.setattr(access, "CONNECT_SECONDS", 1.0)
    configure(refused() if kind == "refused" else "https://nowhere.invalid")
    if kind != "refused":  # as a resolver and a router would behave; no test asks the real network
        monkeypatch.setattr(socket, "create_connection", broken(kind))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="cannot be reached.*check the network"):
        access.connect(access.read_config())
    assert time.monotonic() - start < 1.9


def broken(kind):
    def connect(address, timeout):
        if kind == "no such name":
            raise socket.gaierror(-2, "Name or service not known")
        time.sleep(timeout if kind == "no answer" else 5)
        raise TimeoutError("timed out")

    return connect


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"])
def test_a_proxy_out_of_reach_is_named(configure, monkeypatch, proxy):
    pytest.importorskip("qai_hub", reason='no client of AI Hub: pip install "optimum-mobilequant[ai-hub]"')
    port = refused().rpartition(":")[2]
    monkeypatch.setenv("HTTPS_PROXY", proxy.format(port=port))
    configure("https://nowhere.invalid")
    with pytest.raises(ConnectionError, match=f"at the proxy 127.0.0.1:{port} for https://nowhere.invalid"):
        access.connect(access.read_config())


def test_the_limits_sum_up_to_less_than_five_seconds():
    assert access.CONNECT_SECONDS < 5


def test_a_refused_token(service, configure):
    path = configure(service.url, token="wrong-token")
    with pytest.raises(PermissionError, match=f"refused the API token in {path}.*/account/.*qai-hub configure") as bad:
        access.connect(access.read_config())
    assert "wrong-token" not in str(bad.value)
    assert not service.counts


def test_a_service_that_is_down(service, configure):
    configure(service.url)
    service.status["users"] = 503
    with pytest.raises(ConnectionError, match="answers 503"):
        access.connect(access.read_config())


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("SSLError", "certificate of .* is not accepted.*REQUESTS_CA_BUNDLE"), ("ReadTimeout", "did not answer")],
)
def test_faults_below_the_protocol(service, configure, monkeypatch, fault, expected):
    import requests

    def get(*arguments, **options):
        raise getattr(requests.exceptions, fault)(f"a request with {TOKEN}")

    configure(service.url)
    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(ConnectionError, match=expected) as bad:
        access.connect(access.read_config())
    assert TOKEN not in str(bad.value)


def test_a_token_withdrawn_later(service, hub, monkeypatch):
    monkeypatch.setattr("tests.exporters.ai_hub.server.TOKEN", "another")
    with pytest.raises(ValueError, match="refused listing the devices: Failed to authenticate") as bad:
        hub.find_device("x")
    assert "\n" not in str(bad.value) and "│" not in str(bad.value)


def test_what_the_client_prints_is_logged_without_the_token(hub, caplog, capsys):
    name = "transformers.optimum_mobilequant.exporters.ai_hub.access"
    with caplog.at_level(logging.DEBUG, logger=name), hub.calling("printing"):
        print(f"Scheduled a job with {TOKEN}\n")
    assert caplog.messages == ["Scheduled a job with [token]"]
    assert capsys.readouterr().out == ""


def test_errors_of_the_client_come_as_one_line_without_cause(hub):
    with (
        pytest.raises(RuntimeError, match=r"failed while testing: KeyError: .*\[token\]") as bad,
        hub.calling("testing"),
    ):
        raise KeyError(f"header {TOKEN}")
    assert bad.value.__suppress_context__


def test_a_local_fault_keeps_its_kind(hub):
    with pytest.raises(OSError, match="uploading failed: .*No space") as bad, hub.calling("uploading"):
        raise OSError(28, "No space left on device")
    assert not isinstance(bad.value, ConnectionError)


def test_nothing_of_the_client_is_imported_with_the_package():
    program = (
        "import sys, optimum_mobilequant.exporters, optimum_mobilequant.exporters.ai_hub as hub; print(hub.run_jobs)"
    )
    program += "; assert not [m for m in sys.modules if m.startswith(('qai_hub', 'h5py', 'boto'))]"
    done = subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_the_client_the_error_names_the_extra(monkeypatch, configure):
    from optimum_mobilequant.exporters import options

    monkeypatch.setattr(options, "find_spec", lambda name: None)
    configure("https://example.org")
    with pytest.raises(ImportError, match=r'qai_hub.*pip install "optimum-mobilequant\[ai-hub\]"'):
        access.connect(access.read_config())
