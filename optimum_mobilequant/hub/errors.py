"""One clear error for each way the Hub can say no. A token is in none of them."""

from __future__ import annotations

import re

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# HfHubHTTPError derives from the HTTP library's own base class, which is another library in other versions of the
# client; the uploads of large files wrap either in a RuntimeError.
HTTP_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
TRANSPORT_ERRORS = (HTTP_ERROR, OSError, RuntimeError)

# The xet client's errors are plain OSErrors (without errno); the Hub's refusal to let it write is in their text.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})[^)]*\), domain: \S*/xet-write-token/")

_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token with write access"
NO_TOKEN = f"no token for the Hub: {_LOG_IN}"


def check_token(token: str | None) -> str:
    """The token without white space around it.

    Raises:
        PermissionError: none, or one that cannot be sent (the client's own error would show it).
    """
    token = (token or "").strip()
    if not token:
        raise PermissionError(NO_TOKEN)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise PermissionError(f"the token holds characters that no token has: copy it again ({_LOG_IN})")
    return token


def explain(error: BaseException, repo_id: str, token: str) -> Exception:
    """What to raise instead of an error of the client.

    The client's own error is not chained to it: its text holds what the server answered, and its request the token.

    Args:
        error: from ``huggingface_hub``. repo_id: where the upload goes. token: is cut out of every text.
    """
    if isinstance(error, ValueError) and not isinstance(error, HTTP_ERROR):  # metadata, or an object of a batch
        return ValueError(f"the Hub refused the upload to {repo_id}: {without_token(str(error), token)}")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HTTP_ERROR, OfflineModeIsEnabled)):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE forbids the upload: unset it and push again")
    # A file store's refusal of a part, wrapped in a RuntimeError, says nothing about the token.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and cause is None and (named := _XET_STATUS.search(str(error))):
        status = int(named[1])
    said = without_token(getattr(cause, "server_message", None) or str(cause or error), token)
    if status == 401:
        return PermissionError(f"the Hub does not accept this token (401): {_LOG_IN}")
    if status == 403:
        return PermissionError(
            f"this token may not write to {repo_id} (403): use a token with write access "
            "(https://huggingface.co/settings/tokens), or a name under your own account"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return ValueError(f"the Hub refused the upload to {repo_id} ({status}): {said}")
    if cause is None and isinstance(error, OSError) and error.errno is not None:  # a file that cannot be read here
        return OSError(f"the upload to {repo_id} stopped: {said}")
    return ConnectionError(
        f"the upload to {repo_id} was interrupted ({said}). Push again: the repository changes only as a whole, and "
        "files that arrived are not sent twice"
    )


def without_token(text: str, token: str) -> str:
    """``text`` on one line, without ``token``."""
    return " ".join(text.split()).replace(token, "hf_***")
