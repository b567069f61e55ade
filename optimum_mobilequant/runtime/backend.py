"""Which arithmetic a quantized model computes with: kernels on integers, or the simulation in floats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.pack import input_of
from ..config.options import BACKENDS
from ..kernels import BACKENDS as KERNELS
from ..kernels.registry import VARIABLE, unavailable
from ..log import get_logger
from ..lookup import unknown_name
from ..nn import QuantEmbedding, QuantLinear, QuantNorm, QWeight
from .linear import Served, pack_linear

if TYPE_CHECKING:
    from ..plan import Plan

logger = get_logger(__name__)

_RUNTIME = "_mobilequant_runtime"  # attribute of a model
FUSED = ("cpp", "onednn")  # backends that compute whole decoder layers, the fastest first


@dataclass
class Runtime:
    """State of a model that does not only simulate.

    Args:
        backend: what was asked for.
        served: how each linear is computed.
        packed: each weight that this holds for, in which state of it, and on which device.
    """

    backend: str
    served: dict[str, Served] = field(default_factory=dict)
    packed: list[tuple[Any, int, torch.device]] = field(default_factory=list)
    plan: Plan | None = None


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
    """How each linear of a model is computed, in the order of the data flow; empty while it simulates.

    Args:
        model: as ``quantize`` or ``from_pretrained`` returned it.
    """
    runtime: Runtime | None = getattr(model, _RUNTIME, None)
    return list(runtime.served.values()) if runtime else []


@contextmanager
def simulated(model: PreTrainedModel) -> Iterator[None]:
    """The simulation for a ``with`` block, whatever backend the model has.

    Args:
        model: as ``quantize`` or ``from_pretrained`` returned it; afterwards it has its backend again.
    """
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
    give_back(model)


@torch.no_grad()
def refresh(model: PreTrainedModel) -> None:
    """Pack what is not packed: the first time, after a move to another device, or after a state dict was loaded."""
    runtime: Runtime | None = getattr(model, _RUNTIME, None)
    # Asked before every token, so without a look at the module tree.
    if runtime is None or (runtime.packed and all(w.generation == g and w.device == d for w, g, d in runtime.packed)):
        return
    if runtime.plan is None:
        from ..hf_quantizer import plan_of

        runtime.plan = plan_of(model, model.config.quantization_config)
    plan = runtime.plan
    weights = {path: model.get_submodule(path)._weight() for path in linears_of(plan)}  # type: ignore[operator]
    give_back(model)
    fused = fuse_layers(model, plan, runtime, {weight.device.type for weight in weights.values()})
    embedding: Any = model.get_submodule(plan.family.embedding)
    for path in weights:
        if not fused or path == plan.family.head:
            linear: Any = model.get_submodule(path)
            input: Any = model.get_submodule(input_of(plan, path))
            like = embedding if path == plan.family.head else None
            linear.kernel, runtime.served[path] = pack_linear(path, linear, input, runtime.backend, like=like)
    runtime.packed = [(weight, weight.generation, weight.device) for weight in weights.values()]
    report_slow(runtime)


def fuse_layers(model: PreTrainedModel, plan: Plan, runtime: Runtime, devices: set[str]) -> bool:
    """Fuse the decoder layers where the backend asked for allows it; whether it was done."""
    from .blocks import NotFused
    from .layer import fuse

    backend = layer_backend(runtime.backend)
    if backend is None or devices != {"cpu"}:
        if backend is not None and "cpu" in devices:
            logger.warning(
                f"decoder layers run as single kernels, not fused: the model lies on {' and '.join(sorted(devices))}; "
                "put all of it on one device"
            )
        return False
    try:
        fuse(model, plan, backend)
    except NotFused as error:
        logger.warning(f"decoder layers run as single kernels with float steps between them, not fused: {error}")
        return False
    reasons = {name: reason for name in FUSED[: FUSED.index(backend)] if (reason := unavailable(name))}
    for path in linears_of(plan):
        linear: Any = model.get_submodule(path)
        bits = model.get_submodule(input_of(plan, path)).spec.bits  # type: ignore[union-attr]
        runtime.served[path] = Served(path, f"linear_w{linear._weight().code_bits}a{bits}, fused", backend, reasons)
    return True


def layer_backend(asked: str) -> str | None:
    """The backend that whole decoder layers on a CPU are given to: ``"cpp"``, ``"onednn"``, or None."""
    named = os.environ.get(VARIABLE) if asked == "auto" else None
    names = (named,) if named else FUSED if asked in ("auto", "cpp") else (asked,)
    return next((name for name in names if name in FUSED and unavailable(name) is None), None)


def give_back(model: nn.Module) -> None:
    """Every weight has its codes again, and nothing computes with kernels."""
    from .layer import unfuse

    unfuse(model)
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantNorm):
            module.kernel = None
        if isinstance(module, QuantEmbedding):
            module.keeps_float32 = False
        if isinstance(module, QWeight):
            module.take_back()


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
