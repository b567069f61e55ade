"""Loggers and progress bars under transformers' own switches, so that its settings apply to this package."""

from __future__ import annotations

import logging as standard
import os
from collections.abc import Iterable
from typing import Any, cast

from tqdm.auto import tqdm
from transformers.utils import logging

ROOT = "transformers.optimum_mobilequant"


def get_logger(name: str) -> standard.Logger:
    """Logger of a module of this package.

    Args:
        name: ``__name__`` of the module.
    """
    return cast("standard.Logger", logging.get_logger(f"transformers.{name}"))


def show_progress_lines() -> None:
    """Show this package's INFO lines (estimates, losses, times), unless TRANSFORMERS_VERBOSITY says what to show."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        get_logger("optimum_mobilequant").setLevel(standard.INFO)


def progress_bar(
    items: Iterable[Any] | None,
    description: str,
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    leave: bool = False,
    show: bool = True,
) -> Any:
    """A tqdm bar with the time left, on stderr; none where transformers' bars are off
    (``transformers.utils.logging.disable_progress_bar()`` or ``HF_HUB_DISABLE_PROGRESS_BARS=1``).

    Args:
        items: what is gone through; None for a bar that ``update`` moves.
        description: the stage. unit: what is counted.
        total: how many there are, if ``items`` does not tell. initial: how many were done before.
        leave: the bar stays when it is full. show: False for none.
    """
    off = not (show and logging.is_progress_bar_enabled())
    return tqdm(items, desc=description, total=total, initial=initial, unit=unit, leave=leave, disable=off)
