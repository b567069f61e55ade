"""The backends of integer linear layers, and the choice among them: a table, reported, never silently slow."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..log import get_logger
from . import cpp, gpu, onednn, reference, simulate
from .spec import Call, LinearSpec, Packed, Weights

logger = get_logger(__name__)

VARIABLE = "MOBILEQUANT_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to compute a linear layer.

    Args:
        name: key of :data:`BACKENDS`.
        summary: one line for people.
        available: None, or why this machine cannot use it. May compile; asked once.
        supports: None, or why it cannot run a given layer.
        pack: the layer's tensors in its layout.
        unpack: the codes that were packed, int8 ``[out, in]``; None where the layout does not hold them.
        unpack_rows: those of some output channels, without unpacking the others; None where that is not possible.
        run: one call.
        integer: counts in integers, so that totals equal the reference's bit for bit.
        groups: multiplies groups of 4-bit weights itself; to the others their products go as 8-bit codes.
    """

    name: str
    summary: str
    available: Callable[[], str | None]
    supports: Callable[[LinearSpec], str | None]
    pack: Callable[[LinearSpec, Weights], Packed]
    run: Callable[[Call], Tensor]
    integer: bool
    groups: bool = False
    unpack: Callable[[LinearSpec, Packed], Tensor] | None = None
    unpack_rows: Callable[[LinearSpec, Packed, Tensor], Tensor] | None = None


def _backend(name: str, module: ModuleType, summary: str, *, integer: bool, groups: bool = False) -> Backend:
    unpacking = (getattr(module, "unpack", None), getattr(module, "unpack_rows", None))
    asked = (module.available, module.supports)
    return Backend(name, summary, *asked, module.pack, module.run, integer, groups, *unpacking)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        _backend(
            "triton", gpu, "Triton kernels: NVIDIA GPUs of compute capability 8.0 or newer", integer=True, groups=True
        ),
        _backend("cpp", cpp, "kernels compiled on first use: AMX, AVX512-VNNI, AVX-VNNI, AVX2, NEON", integer=True),
        _backend("onednn", onednn, "torch's quantized linear on x86, 4-bit weights unpacked to 8", integer=True),
        _backend("simulate", simulate, "float32 product of dequantized tensors, any device", integer=False),
        _backend("reference", reference, "exact integers, slow: what the others are compared with", integer=True),
    )
}


@dataclass(frozen=True)
class Choice:
    """The backend of a layer, and for each faster one why it is not used."""

    backend: Backend
    reasons: dict[str, str] = field(default_factory=dict)


def order(spec: LinearSpec) -> tuple[str, ...]:
    """Names of the backends for a layer, the fastest first. The reference is used only if asked for by name."""
    if spec.device == "cuda":
        return ("triton", "simulate")
    # With AMX units oneDNN multiplies 8-bit matrices two to three times as fast as vector instructions do; our own
    # kernels for them were never measured. Of 16-bit codes it takes two products and adds them in float32: those stay
    # with the kernels that count in integers.
    if spec.weight_bits == spec.activation_bits == 8 and spec.device == "cpu" and has_amx():
        return ("onednn", "cpp", "simulate")
    return ("cpp", "onednn", "simulate")


@cache
def has_amx() -> bool:
    """Whether the processor has matrix units for bytes (x86 AMX)."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def choose(spec: LinearSpec, *, backend: str | None = None) -> Choice:
    """The fastest backend that can run a layer.

    Args:
        spec: the layer.
        backend: use this one; None for the environment variable MOBILEQUANT_BACKEND, or else the fastest.

    Raises:
        ValueError: the backend asked for is unknown, not available or not able to run this layer.
    """
    wanted = backend or os.environ.get(VARIABLE)
    if wanted:
        if wanted not in BACKENDS:
            raise ValueError(f"no kernel backend {wanted!r}; there are {', '.join(BACKENDS)}")
        if reason := why_not(wanted, spec):
            raise ValueError(f"kernel backend {wanted!r} cannot run {spec.op}: {reason}")
        return Choice(BACKENDS[wanted])
    reasons: dict[str, str] = {}
    for name in order(spec):
        if (reason := why_not(name, spec)) is None:
            return Choice(BACKENDS[name], reasons)
        reasons[name] = reason
    raise ValueError(f"no kernel backend can run {spec.op}: {'; '.join(f'{k}: {v}' for k, v in reasons.items())}")


def why_not(name: str, spec: LinearSpec) -> str | None:
    """Why a backend cannot run a layer, or None. What the layer needs is asked before the machine is."""
    found = BACKENDS[name]
    if spec.group and not found.groups:
        return "it has no multipliers of groups"
    return found.supports(spec) or unavailable(name)


@cache
def unavailable(name: str) -> str | None:
    """Why this machine cannot use a backend, or None. A reason is logged, once.

    Args:
        name: a key of ``BACKENDS``.
    """
    reason = BACKENDS[name].available()
    if reason is not None:
        logger.warning(f"kernel backend {name!r} is not used: {reason}")
    return reason
