"""Memory a run will need, and what it used."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ..config.recipes import COMPENSATED
from ..config.settings import Settings
from ..plan import Plan

# What the process grows by for each byte of activations: the allocator keeps room between tensors that come and go.
# Measured by benchmarks/memory.py, 1.5 to 1.8.
ALLOCATED = 1.6


def memory_estimate(plan: Plan, settings: Settings) -> int:
    """Bytes a run needs beyond the interpreter.

    Float32 weights; for training, what the backward pass reads: the tensors that were rounded, of all layers or, with
    gradient checkpointing, the inputs of all layers and the tensors of one; the logits of one batch with the gradient
    of their divergence; and one layer's rounded weights with their gradients. Rounded tensors, scores, probabilities
    and the teacher's logits are computed again where they are needed.
    """
    g = plan.geometry
    layer = 2 * g.head_dim * (g.heads + g.kv_heads) * g.hidden + 3 * g.hidden * g.mlp
    embedding = g.vocabulary * g.hidden * (1 if g.tied else 2)
    tokens = settings.batch_size * settings.seq_len
    sites = 12 * g.hidden + 6 * g.head_dim * (g.heads + g.kv_heads) + 5 * g.mlp
    scores = g.heads * settings.seq_len
    # GPTQ and Qronos: hidden states of all sequences, the weights in steps, moments and factors in float64.
    compensated = 0
    if {settings.rounding, settings.rounding_start} & set(COMPENSATED):
        streams = 2 if "qronos" in (settings.rounding, settings.rounding_start) else 1
        compensated = streams * settings.samples * settings.seq_len * g.hidden + layer * g.layers
        compensated += 10 * max(g.hidden, g.mlp, g.heads * g.head_dim) ** 2
    if not _trains(settings):
        plain = layer * (g.layers + 1) + 2 * embedding + tokens * (sites + 4 * scores + 3 * g.vocabulary)
        return 4 * (plain + compensated)
    rounded = 8 * g.hidden + 3 * g.head_dim * (g.heads + g.kv_heads) + 4 * g.mlp
    layers = 2 * sites + g.layers * g.hidden if settings.gradient_checkpointing else sites + g.layers * rounded
    activations = round(ALLOCATED * tokens * (layers + 5 * g.vocabulary))
    # Learned rounding: the weight in steps, its offset, running mean, best state, two moments and the gradient.
    offsets = 7 * layer * g.layers if settings.rounding_steps else 0
    if settings.finetune_steps:  # the integers; with rank 0 as above, else the same of two thin matrices
        widths = 2 * g.head_dim * (g.heads + g.kv_heads) + 4 * g.hidden + 3 * (g.hidden + g.mlp)
        rank = settings.adapter_rank if settings.finetune == "qad" else None
        learned = {None: 0, 0: 6 * layer}.get(rank, layer + 6 * (rank or 0) * widths)
        offsets = max(offsets, (layer + learned) * g.layers)
    return 4 * (layer * (g.layers + 3) + 2 * embedding + activations + offsets + compensated)


def shortage(plan: Plan, settings: Settings, needed: int, free: int) -> str | None:
    """What to say, with a way out, where a run needs more memory than is free; None where it does not.

    Args:
        needed: bytes beyond what is in memory already. free: bytes, 0 where that is unknown.
    """
    if not 0 < free < needed:
        return None
    way = "a smaller batch_size or seq_len and gradient_checkpointing=True take less"
    if settings.rounding_steps:
        plain = replace(settings, rounding="nearest", rounding_steps=0)
        less = memory_estimate(plan, settings) - memory_estimate(plan, plain)
        way = f'recipe="mobilequant", which does not learn the rounding, takes {less / 2**30:.2f} GiB less; {way}'
    return f"{needed / 2**30:.2f} GiB of memory are needed and {free / 2**30:.2f} GiB are free: {way}"


def _trains(settings: Settings) -> bool:
    return bool(settings.steps or settings.rounding_steps or settings.finetune_steps)


def checkpoints(plan: Plan, settings: Settings, device: torch.device | str) -> bool:
    """Whether layers are recomputed in the backward pass: as asked for, or else where keeping what it reads would take
    more than half of the memory that is free now. The result is the same bit for bit."""
    if settings.gradient_checkpointing is not None or not _trains(settings):
        return bool(settings.gradient_checkpointing)
    return memory_estimate(plan, replace(settings, gradient_checkpointing=False)) > available_memory(device) // 2


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a process could take now without swapping (0 where the system does not tell)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(line for line in meminfo.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvail"))
        return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: all of it, of which half may be free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 0


def held_memory(device: torch.device | str, model: torch.nn.Module) -> int:
    """Bytes that :func:`peak_memory` counts and :func:`memory_estimate` does not: the interpreter with its libraries,
    or on CUDA what other tensors take there; the model's own weights are in the estimate."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if torch.device(device).type == "cuda":
        return max(0, torch.cuda.memory_allocated(device) - weights)
    return max(0, psutil.Process().memory_info().rss - weights)


def reset_peak_memory(device: torch.device | str = "cpu") -> bool:
    """Let :func:`peak_memory` count from now on; False where the system cannot (then it counts from the start)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:  # Linux: 5 sets the peak resident size to the present one
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak of this process (CPU), or allocated on ``device`` (CUDA).

    Linux hands its own ``ru_maxrss`` on from parent to child; ``VmHWM`` starts anew with each program.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
