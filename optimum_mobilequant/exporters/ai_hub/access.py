"""The account on AI Hub: configuration, a check before any work, and the one way to call the client.

The client's own retries take three quarters of a minute on a host that is not there, and its messages come in boxes
of several lines; here a missing configuration, a host out of reach and a refused token are each one line within
seconds. The token is held by :class:`HubConfig` and the client only, and is cut out of every message.
"""

from __future__ import annotations

import configparser
import os
import queue
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import TextIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from transformers.utils import logging as transformers_logging

from ...log import get_logger
from ..options import require
from .devices import Target, find_device

if TYPE_CHECKING:
    import qai_hub

logger = get_logger(__name__)

CONFIGURE = "qai-hub configure --api_token YOUR_TOKEN"
# Seconds for a TCP connection, name lookup included, and for the answer to one small request after it.
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 28.0


@dataclass(frozen=True)
class HubConfig:
    """What the client's ini file holds.

    Args:
        api_token: the secret; left out of ``repr``.
        api_url, web_url: of the service; ``https://...``.
        default_project: where jobs belong, or None.
        path: the ini file, for messages.
    """

    api_token: str = field(repr=False)
    api_url: str
    web_url: str
    default_project: str | None = None
    path: str = "~/.qai_hub/client.ini"


def read_config() -> HubConfig:
    """The configuration that ``qai-hub configure`` wrote: ``$QAIHUB_CLIENT_INI``, or ``~/.qai_hub/client.ini``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ini file, or a field is missing or empty.
    """
    path = Path(os.environ.get("QAIHUB_CLIENT_INI") or "~/.qai_hub/client.ini").expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"AI Hub is not configured (no {path}): make an API token at aihub.qualcomm.com, "
                                f"then run `{CONFIGURE}`")  # fmt: skip
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError):
        # The parser's message quotes the line it stumbled over, which may be the token.
        raise ValueError(f"{path} is no ini file: write it anew with `{CONFIGURE}`") from None
    section = dict(parser["api"]) if parser.has_section("api") else {}
    values = {name: section.get(name, "").strip() for name in ("api_token", "api_url", "web_url")}
    if missing := [name for name, value in values.items() if not value]:
        raise ValueError(f"{path} lacks {', '.join(missing)} under [api]: run `{CONFIGURE}`")
    if urlsplit(values["api_url"]).scheme not in ("http", "https") or not urlsplit(values["api_url"]).hostname:
        raise ValueError(f"api_url {values['api_url']!r} in {path} is no address: run `{CONFIGURE}`")
    return HubConfig(**values, default_project=section.get("default_project"), path=str(path))


def connect(config: HubConfig) -> Hub:
    """Check that the service answers and takes the token, and make a client for it.

    Raises:
        ConnectionError: no connection within :data:`CONNECT_SECONDS`, or the service is down.
        PermissionError: the token is refused.
        ImportError: ``qai_hub`` is not installed.
    """
    require("ai-hub", "qai_hub")
    _reach(config)
    import requests

    url = config.api_url.rstrip("/") + "/api/v1/users/auth/user/"
    try:
        answer = requests.get(
            url,
            headers={"Authorization": f"token {config.api_token}"},
            timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
            allow_redirects=False,  # the token is for this host
        )
    except requests.exceptions.SSLError as error:
        reason = scrub(plain(str(error)), config.api_token)
        raise ConnectionError(
            f"the certificate of {config.api_url} is not accepted: check api_url in {config.path}, or name the "
            f"certificates of your proxy in REQUESTS_CA_BUNDLE ({reason})"
        ) from None
    except requests.RequestException as error:
        reason = scrub(plain(f"{type(error).__name__}: {error}"), config.api_token)
        raise ConnectionError(f"AI Hub at {config.api_url} did not answer ({reason}): try again later") from None
    if answer.status_code in (401, 403):
        raise PermissionError(f"AI Hub refused the API token in {config.path}: copy the current one from "
                              f"{config.web_url.rstrip('/')}/account/ and run `{CONFIGURE}`")  # fmt: skip
    if answer.status_code >= 500:
        raise ConnectionError(f"AI Hub at {config.api_url} answers {answer.status_code}: try again later")
    return Hub(config)


def _reach(config: HubConfig) -> None:
    """Open and close a TCP connection to the service, or to the proxy that leads there.

    In a thread, because a name lookup cannot be given a time limit.
    """
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(config.api_url, get_environ_proxies(config.api_url))
    parts = urlsplit(config.api_url if not proxy else proxy if "//" in proxy else f"//{proxy}")
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    outcome: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            outcome.put(None)
        except OSError as error:
            outcome.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        error = outcome.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        error = TimeoutError(f"no connection within {CONNECT_SECONDS:g} s")
    if error is not None:
        where = f"the proxy {host}:{port} for {config.api_url}" if proxy else f"{host}:{port}"
        raise ConnectionError(
            f"AI Hub cannot be reached at {where} ({error}): check the network and its proxy settings, or api_url in "
            f"{config.path}"
        ) from None


class Hub:
    """A configured client. All calls go through :meth:`calling`."""

    def __init__(self, config: HubConfig) -> None:
        import qai_hub

        self.config = config
        self.client: qai_hub.Client = qai_hub.Client(
            config=qai_hub.ClientConfig(
                api_token=config.api_token,
                api_url=config.api_url,
                web_url=config.web_url,
                default_project=config.default_project,
                # Bars of uploads and downloads; they go to stderr.
                verbose=transformers_logging.is_progress_bar_enabled(),
            )
        )

    @contextmanager
    def calling(self, doing: str) -> Iterator[Any]:
        """Gives the client; what it prints becomes log lines, what it raises one line without the token.

        Args:
            doing: completes "while ..." in an error.

        Raises:
            ConnectionError: no answer after the client's own retries, or a fault of the service.
            ValueError: the service refused the request.
            OSError: a file here cannot be read or written.
            RuntimeError: anything else the client raises.
        """
        from qai_hub import InternalError, UserError
        from qai_hub.client import RateLimitedError
        from qai_hub.public_rest_api import APIException
        from requests import RequestException

        try:
            with redirect_stdout(_LogLines(self.config.api_token)):
                yield self.client
        except Exception as error:
            text = self.clean(str(error))
            if isinstance(error, (InternalError, RateLimitedError, RequestException)):
                raised: Exception = ConnectionError(
                    f"AI Hub failed while {doing}: {text} (what was sent so far is recorded: the same call continues)"
                )
            elif isinstance(error, (UserError, APIException)):
                raised = ValueError(f"AI Hub refused {doing}: {text}")
            elif isinstance(error, OSError):  # this machine's: a full disk, a file that cannot be read
                raised = OSError(f"{doing} failed: {text}")
            else:
                raised = RuntimeError(f"the qai_hub client failed while {doing}: {type(error).__name__}: {text}")
        else:
            return
        raise raised from None  # the cause may quote a request

    def clean(self, text: str) -> str:
        """One line of the service's text, without the token, should it be quoted there."""
        return scrub(plain(text), self.config.api_token)

    def find_device(self, wanted: str | None) -> Target:
        """See :func:`devices.find_device`; the list is the service's."""
        with self.calling("listing the devices"):
            listed = self.client.get_devices()
        return find_device(listed, wanted)


def plain(text: str) -> str:
    """One line from the client's boxed messages."""
    return " ".join(re.sub(r"[┌┐└┘─│|]", " ", text).split())


def scrub(text: str, secret: str) -> str:
    """``text`` with the secret cut out."""
    return text.replace(secret, "[token]") if secret else text


class _LogLines(TextIOBase):
    """A text file whose lines go to the log."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def write(self, text: str) -> int:
        if line := scrub(plain(text), self._secret):
            logger.debug(line)  # what matters of it is logged by the caller
        return len(text)
