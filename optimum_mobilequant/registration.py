"""Registers the method with transformers at the moment transformers' own table of methods is loaded.

Registering at once would import ``transformers.quantizers`` and torch, seconds of work that ``mobilequant --help`` or
a script that only reads a config does not need. Everything that looks a method up goes through that module, so
registering when it has just been executed is early enough. The means is the import system's own: a finder on
``sys.meta_path`` that answers for this one module and hands everything else on.

A module of this package may be the one that loads it, with transformers' model code, and is then half imported itself.
So what is registered at that moment must not import it again: the config, which needs no model code, and a class that
stands for the quantizer until one is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "mobilequant"
MODULE = "transformers.quantizers.auto"


def register_when_loaded() -> None:
    """Register now if that module is loaded already, else as soon as it is. A second call does nothing."""
    if MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer

    from .config import MobileQuantConfig

    class DeferredQuantizer(HfQuantizer):
        """Making one gives a ``MobileQuantHfQuantizer``."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from .hf_quantizer import MobileQuantHfQuantizer

            return MobileQuantHfQuantizer(*args, **kwargs)

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MobileQuantConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(DeferredQuantizer)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        # looking for the module is not loading it: this finder stays until the loader below has run
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes the module as its own loader does, then registers."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        _register()
