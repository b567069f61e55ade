"""Which device of AI Hub is meant, and whether its NPU can run the result."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

# Attributes of a device on AI Hub that decide; "name:value" strings.
_QNN = "framework:qnn"
_HTP = "hexagon:"
_SOC = "soc-model:"
_WEIGHT_SHARING = "htp-supports-weight-sharing:true"
# Names of devices that AI Hub compiles for but does not own end so.
_PROXY = "(proxy)"


class Listed(Protocol):
    """An entry of the service's list (``qai_hub.Device``)."""

    name: str
    attributes: str | list[str]


@dataclass(frozen=True)
class Target:
    """A device that QNN's HTP backend runs on.

    Args:
        name: as AI Hub spells it.
        hexagon: architecture of the NPU, e.g. ``"v75"``.
        soc_model: QNN's number of the chip, or None if it is not listed.
        weight_sharing: two graphs of one context binary can share weights.
        physical: jobs can run on it; a proxy is only compiled for.
    """

    name: str
    hexagon: str
    soc_model: int | None
    weight_sharing: bool
    physical: bool


def find_device(devices: Iterable[Listed], wanted: str | None) -> Target:
    """The device called ``wanted``, in any case of letters.

    Args:
        devices: all that the service lists; one name may occur with several system versions.
        wanted: the full name.

    Raises:
        ValueError: none given, an unknown name (the error has similar ones), or a device without HTP.
    """
    known: dict[str, set[str]] = {}
    for device in devices:
        listed = [device.attributes] if isinstance(device.attributes, str) else device.attributes
        known.setdefault(device.name, set()).update(listed)
    able = [name for name, has in known.items() if _has_htp(has)]
    if wanted is None:
        raise ValueError(f"AI Hub needs a device: give the name of one of {len(able)}, e.g. {_quoted(able[:5])}")
    found = next((name for name in known if name.casefold() == wanted.strip().casefold()), None)
    if found is None:
        near = _similar(wanted, able)
        hint = f"similar: {_quoted(near)}" if near else f"known are {len(able)}, e.g. {_quoted(able[:5])}"
        raise ValueError(f"AI Hub lists no device {wanted!r} for this account; {hint}")
    attributes = known[found]
    if not _has_htp(attributes):
        raise ValueError(
            f"{found!r} has no Hexagon NPU that QNN reaches, and the integer graphs need one: take another device, "
            f"e.g. {_quoted(_similar(found, able) or able[:5])}"
        )
    soc = _value(attributes, _SOC)
    return Target(
        name=found,
        hexagon=_value(attributes, _HTP) or "",
        soc_model=int(soc) if soc is not None and soc.isdecimal() else None,
        weight_sharing=_WEIGHT_SHARING in attributes,
        physical=not found.casefold().endswith(_PROXY),
    )


def _has_htp(attributes: set[str]) -> bool:
    return _QNN in attributes and _value(attributes, _HTP) is not None


def _value(attributes: set[str], prefix: str) -> str | None:
    return next((a.removeprefix(prefix) for a in sorted(attributes) if a.startswith(prefix)), None)


def _similar(wanted: str, names: Sequence[str]) -> list[str]:
    folded = {name.casefold(): name for name in names}
    inside = [name for key, name in folded.items() if wanted.strip().casefold() in key]
    close = [folded[key] for key in difflib.get_close_matches(wanted.strip().casefold(), folded, n=5, cutoff=0.6)]
    return list(dict.fromkeys([*close, *inside]))[:5]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"
