"""What transformers calls the cache of keys and values."""

from __future__ import annotations

import inspect

from torch import nn


def cache_name(model: nn.Module) -> str:
    """Argument of ``model.forward`` and field of its output: ``"cache"`` since transformers 5.24, before that, and in
    models that did not follow, ``"past_key_values"``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
