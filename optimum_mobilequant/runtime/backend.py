"""Which arithmetic a quantized model computes with: kernels on integers, or the simulation in floats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.pack import input_of
from ..kernels import BACKENDS as KERNELS
from ..log import get_logger
from ..lookup import unknown_name
from ..nn import QuantLinear, QWeight
from ..options import BACKENDS
from ..plan import Plan
from .linear import Served, pack_linear

logger = get_logger(__name__)

_RUNTIME = "_mobilequant_runtime"  # attribute of a model


@dataclass
class Runtime:
    """State of a model that does not only simulate.

    Args:
        backend: what was asked for.
        served: how each linear is computed. packed: which state of a weight, and on which device, that holds for.
    """

    backend: str
    served: dict[str, Served] = field(default_factory=dict)
    packed: dict[str, tuple[int, torch.device]] = field(default_factory=dict)


def set_backend(model: PreTrainedModel, name: str) -> None:
    """Choose what a quantized model computes with, from now on and for this object only.

    Args:
        model: as ``quantize`` or ``from_pretrained`` returned it.
        name: ``"auto"`` (the fastest that runs here), ``"cpp"``, ``"onednn"``, ``"triton"``, ``"reference"`` (exact
            integers, slow) or ``"simulate"`` (floats that hold the integers' values). What the named one cannot
            compute falls to the next one, with one warning.

    Raises:
        ValueError: an unknown name, or a model that was not quantized by this package.
    """
    from ..hf_quantizer import METHOD

    if name not in BACKENDS:
        raise ValueError(unknown_name("backend", name, BACKENDS))
    if getattr(model, "quantization_method", None) != METHOD:
        raise ValueError("set_backend takes a model that optimum_mobilequant quantized or loaded")
    release(model)
    if name != "simulate":
        setattr(model, _RUNTIME, Runtime(name))
        model.register_forward_pre_hook(_refresh_before)
        refresh(model)


def backend_of(model: nn.Module) -> str:
    """The name given to :func:`set_backend`; ``"simulate"`` for a model that was never prepared."""
    runtime: Runtime | None = getattr(model, _RUNTIME, None)
    return runtime.backend if runtime else "simulate"


def served(model: nn.Module) -> list[Served]:
    """How each linear of a model is computed, in the order of the data flow; empty while it simulates."""
    runtime: Runtime | None = getattr(model, _RUNTIME, None)
    return list(runtime.served.values()) if runtime else []


@contextmanager
def simulated(model: PreTrainedModel) -> Iterator[None]:
    """The simulation for a ``with`` block, whatever backend the model has."""
    name = backend_of(model)
    if name != "simulate":
        set_backend(model, "simulate")
    try:
        yield
    finally:
        if name != "simulate":
            set_backend(model, name)


def release(model: nn.Module) -> None:
    """Give every weight its codes back and compute with the simulation."""
    if getattr(model, _RUNTIME, None) is None:
        return
    delattr(model, _RUNTIME)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _refresh_before:
            del model._forward_pre_hooks[key]
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernel = None
        if isinstance(module, QWeight):
            module.take_back()


@torch.no_grad()
def refresh(model: PreTrainedModel) -> None:
    """Pack what is not packed: the first time, after a move to another device, or after a state dict was loaded."""
    runtime: Runtime | None = getattr(model, _RUNTIME, None)
    if runtime is None:
        return
    from ..hf_quantizer import plan_of

    plan: Plan = plan_of(model, model.config.quantization_config)
    changed = False
    for path in linears_of(plan):
        linear: Any = model.get_submodule(path)
        weight = linear._weight()
        state = (weight.generation, weight.device)
        if runtime.packed.get(path) == state:
            continue
        input: Any = model.get_submodule(input_of(plan, path))
        linear.kernel, runtime.served[path] = pack_linear(path, linear, input, runtime.backend)
        runtime.packed[path], changed = (weight.generation, weight.device), True
    if changed:
        report_slow(runtime)


def _refresh_before(model: Any, args: Any) -> None:
    """Forward pre-hook of the model."""
    if not torch.compiler.is_compiling():
        refresh(model)


def report_slow(runtime: Runtime) -> None:
    """One warning about the layers that are not computed as asked, with the reason and what helps."""
    slow: dict[str, list[str]] = {}
    for layer in runtime.served.values():
        if runtime.backend not in ("auto", layer.backend) or layer.backend == "simulate":
            slow.setdefault(layer.backend, []).append(layer.name)
    for backend, names in slow.items():
        reasons = runtime.served[names[0]].reasons
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        logger.warning(
            f'{len(names)} of {len(runtime.served)} linear layers ({names[0]}, ...) run with backend "{backend}" '
            f"({KERNELS[backend].summary}): {why}. `mobilequant doctor CHECKPOINT` lists all layers"
        )


def linears_of(plan: Plan) -> Iterator[str]:
    """Paths of all linear layers, the head last."""
    f = plan.family
    for i in range(plan.geometry.layers):
        yield from (f.layer(i, part) for part in (f.query, f.key, f.value, f.out, f.gate, f.up, f.down))
    yield f.head
