"""Names on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name``; the Hub is not asked."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def check_hub_id(name: str, what: str) -> str:
    """``name``, if it has the form of a Hub id.

    Args:
        what: the option, for the message.

    Raises:
        ValueError: any other form.
    """
    if not is_hub_id(name):
        raise ValueError(
            f"{what} {name!r} is no Hub id: give owner/name, of letters, digits and single - _ . and 96 characters "
            "at most"
        )
    return name


def hub_id_of(name_or_path: str | None) -> str | None:
    """Hub id of what transformers loaded under this name; None for a folder, or for a model made in memory."""
    name = name_or_path or ""
    return name if is_hub_id(name) and not Path(name).exists() else None
