"""Loggers under transformers' own, so that its verbosity settings and handler apply to this package."""

from __future__ import annotations

import logging as standard
import os
from typing import cast

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
