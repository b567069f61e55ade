"""Names in tables: finding them, and what to say when they are not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not in a table: the nearest known name, then all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ";"
    return f'{kind} "{name}" is unknown{hint} known: {", ".join(known)}'


def lookup(kind: str, table: Mapping[str, T], name: object) -> T:
    """``table[name]``, or a ValueError that names the nearest key and lists them all."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(unknown_name(kind, name, table))
