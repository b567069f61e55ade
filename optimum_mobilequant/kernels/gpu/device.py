"""The GPU that a kernel is for: whether it can be used, and what the table needs to know of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from packaging.version import Version

from .configs import OLDEST, architecture

OLDEST_TRITON = "3.6"  # as in the extra "gpu"

# Triton's own switch, read when its kernels are imported: they are then run on the CPU, line by line.
INTERPRETER = "TRITON_INTERPRET"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (on CPU tensors, for tests)."""
    return os.environ.get(INTERPRETER) == "1"


def triton_version() -> str | None:
    """Version of the package that is installed; None where it came without one (built from source)."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def unusable() -> str | None:
    """Why no kernel can run on this machine's GPUs, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'optimum-mobilequant[gpu]'"
    if (found := triton_version()) is not None and Version(found) < Version(OLDEST_TRITON):
        return f"Triton {found} lacks what the kernels use, {OLDEST_TRITON} has it; a newer torch brings a newer one"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_capability(index)
        if has < OLDEST:
            name = torch.cuda.get_device_name(index)
            return (
                f"{name} has compute capability {has[0]}.{has[1]}, and the kernels need {OLDEST[0]}.{OLDEST[1]} "
                "(Ampere) or newer; hide it with CUDA_VISIBLE_DEVICES to use another GPU"
            )
    return None


@cache
def architecture_of(device: torch.device) -> str:
    """Key of :data:`~.configs.TABLE` for a device."""
    return "sm80" if device.type == "cpu" else architecture(torch.cuda.get_device_capability(device))


@cache
def processors_of(device: torch.device) -> int:
    """Number of multiprocessors."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def name_of(device: torch.device) -> str:
    """The GPU's name, as the vendor writes it."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that kernels are launched on."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)
