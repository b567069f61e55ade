"""Memory a run will need, and what it used."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .plan import Plan
from .recipes import COMPENSATED
from .settings import Settings


def memory_estimate(plan: Plan, settings: Settings) -> int:
    """Bytes a run needs beyond the interpreter.

    Float32 weights; for training, the rounded weights and activations that the backward pass reads (with gradient
    checkpointing those of one layer): two tensors for each learned quantizer and one for what lies between, one score
    matrix for the softmax and one of probabilities; and the logits of one batch, of student and teacher, with the
    gradients of their divergence.
    """
    g = plan.geometry
    layer = 2 * g.head_dim * (g.heads + g.kv_heads) * g.hidden + 3 * g.hidden * g.mlp
    embedding = g.vocabulary * g.hidden * (1 if g.tied else 2)
    tokens = settings.batch_size * settings.seq_len
    sites = 12 * g.hidden + 6 * g.head_dim * (g.heads + g.kv_heads) + 5 * g.mlp
    scores = g.heads * settings.seq_len
    # GPTQ and Qronos: hidden states of all sequences, the weights in steps, moments and factors in float64.
    compensated = 0
    if settings.rounding in COMPENSATED:
        streams = 2 if settings.rounding == "qronos" else 1
        compensated = streams * settings.samples * settings.seq_len * g.hidden + layer * g.layers
        compensated += 10 * max(g.hidden, g.mlp, g.heads * g.head_dim) ** 2
    if not (settings.steps or settings.rounding_steps):
        plain = layer * (g.layers + 1) + 2 * embedding + tokens * (sites + 4 * scores + 3 * g.vocabulary)
        return 4 * (plain + compensated)
    kept = 1 if settings.gradient_checkpointing else g.layers
    activations = tokens * (kept * (3 * sites + 2 * scores) + 3 * scores + 10 * g.vocabulary)
    # Learned rounding: the weight in steps, its offset, running mean, best state, two moments and the gradient.
    offsets = 7 * layer * g.layers if settings.rounding_steps else 0
    return 4 * (layer * (g.layers + kept) + 2 * embedding + activations + offsets + compensated)


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
