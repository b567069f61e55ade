"""What the Hub says about the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from ..log import get_logger
from .errors import TRANSPORT_ERRORS

logger = get_logger(__name__)


@dataclass(frozen=True)
class Base:
    """A float model on the Hub.

    Args:
        id: ``owner/name``.
        license, license_name, license_link: as in the metadata of its card; None where unknown.
        weight_bytes: size of its safetensors files, or None where unknown.
        described: whether the Hub told; then a licence of None means that the base has no licence tag.
    """

    id: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    weight_bytes: int | None = None
    described: bool = False


def look_up(name: str, api: HfApi) -> Base:
    """Ask the Hub; what it does not tell stays unknown, with a warning, for a card can do without."""
    try:
        info = api.model_info(name, files_metadata=True)
    except OfflineModeIsEnabled:
        logger.warning(f"offline: the licence of {name} was not looked up")
        return Base(name)
    except TRANSPORT_ERRORS as error:
        logger.warning(
            f"the Hub tells nothing about {name} ({type(error).__name__}): check the name of the base model"
        )
        return Base(name)
    card: Any = info.card_data or {}
    link = card.get("license_link")
    if isinstance(link, str) and "://" not in link:  # a file beside the base's card
        link = f"{api.endpoint}/{name}/blob/main/{link}"
    sizes = [file.size for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    known = [size for size in sizes if size is not None]
    weight_bytes = sum(known) if known and len(known) == len(sizes) else None
    license, license_name = _text(card.get("license")), _text(card.get("license_name"))
    return Base(name, license, license_name, _text(link), weight_bytes, described=True)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
