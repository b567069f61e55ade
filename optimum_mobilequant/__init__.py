"""optimum-mobilequant: integer-only language models for phone NPUs, quantized in one line.

Importing the package registers the ``mobilequant`` quantization method with transformers (as soon as transformers
loads its model code)::

    from transformers import AutoModelForCausalLM
    from optimum_mobilequant import MobileQuantConfig

    model = AutoModelForCausalLM.from_pretrained(
        "org/model", quantization_config=MobileQuantConfig("w4a8", dataset="calib.txt")
    )
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registration import register_when_loaded

__version__ = "0.1.0"

# Public name -> module; resolved on first use, so that importing the package stays cheap.
_PUBLIC = {
    "MobileQuantConfig": "config",
    "quantize": "pipeline",
    "compare": "evaluate.compare",
    "export": "exporters",
    "perplexity": "evaluate.perplexity",
    "push": "hub.push",
    "inspect_checkpoint": "checkpoint.inspection",
    "set_backend": "runtime",
}

__all__ = [
    "MobileQuantConfig",
    "__version__",
    "compare",
    "export",
    "inspect_checkpoint",
    "perplexity",
    "push",
    "quantize",
    "set_backend",
]

if TYPE_CHECKING:
    from .checkpoint.inspection import inspect_checkpoint
    from .config import MobileQuantConfig
    from .evaluate.compare import compare
    from .evaluate.perplexity import perplexity
    from .exporters import export
    from .hub.push import push
    from .pipeline import quantize
    from .runtime import set_backend


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_loaded()
