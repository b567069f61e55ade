"""How long a run will take: one forward pass is timed, and what the stages do is counted in such passes."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from ..calibrate.prefix import TEXTS
from ..config.recipes import COMPENSATED
from ..tune.output_ranges import SEQUENCES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config.settings import Settings
    from ..plan import Plan

# Float forward passes of one sequence that a sequence costs in each kind of work, measured on the demo model with two
# cores; `.ci/test_demo.py` holds the estimate against what the demo's runs then took.
CALIBRATE = 2.0  # with observers at every activation
ROUNDED = 2.0  # through a student that rounds
STEP = 7.0  # the teacher's targets, the student forward and backward, the optimizer
COMPENSATE = 6.0  # per layer with and without rounding, and the sums of squares; the factors are counted apart
SEARCH = 9 * 12  # factors x searched activations of a layer, each a pass through that layer


def remaining_work(plan: Plan, settings: Settings, validation: int, finished: Collection[str] = ()) -> float:
    """Forward passes of one sequence that a run has before it.

    Args:
        validation: number of validation sequences.
        finished: stages that the run directory keeps; a stage under way counts in full.
    """
    s, g = settings, plan.geometry
    step = s.batch_size * (STEP + (ROUNDED if s.gradient_checkpointing else 0))
    score = validation * (1 + ROUNDED)

    def trained(steps: int) -> float:
        return steps * step + (steps / max(s.eval_every, 1) + 1) * score if steps else 0.0

    compensated = 0.0
    if {s.rounding, s.rounding_start} & set(COMPENSATED):
        # A column at a time: as much as reading as many tokens as the matrix has columns, several times slower.
        compensated = s.samples * COMPENSATE + 8 * g.hidden / s.seq_len + 2 * score
    learned = trained(s.steps)
    if s.tuning == "block-wise":  # each step is a step of each layer; no logits
        learned = s.steps * g.layers * step / g.layers + 2 * score
    work = {
        "prefix": 2.0 * min(TEXTS, s.samples) if s.prefix is not False else 0.0,
        "calibrate": s.samples * CALIBRATE,
        "smooth": s.samples * CALIBRATE * 4 if s.smoothing == "adaptive" else 0.0,
        "transform": s.samples * CALIBRATE if s.transforms else 0.0,
        "ranges": min(SEQUENCES, s.samples) * SEARCH * ROUNDED if s.range_init == "output" else 0.0,
        "learn": learned + score,
        "compensate": compensated if s.rounding_start in COMPENSATED else 0.0,
        "round": compensated if s.rounding in COMPENSATED else trained(s.rounding_steps),
        "bias": s.samples * 2 * ROUNDED if s.bias_correction else 0.0,
        "features": trained(s.feature_steps),
        "finetune": trained(s.finetune_steps),
        "pack": validation * ROUNDED,
    }
    return sum(passes for stage, passes in work.items() if stage not in finished)


@torch.no_grad()
def seconds_of_a_pass(model: nn.Module, ids: Tensor) -> float:
    """Time of one forward pass of a sequence, int64 ``[1, length]``: the least of four, for the first one warms up
    and any may be held up by other work on the machine."""
    seconds = float("inf")
    for _ in range(4):
        _wait(ids.device)
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        _wait(ids.device)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_words(minutes: float) -> str:
    """``"less than a minute"``, ``"about 7 minutes"``, ``"about 3 hours"``."""
    if minutes < 1:
        return "less than a minute"
    if minutes < 90:
        return f"about {minutes:.0f} minute{'s' if round(minutes) > 1 else ''}"
    return f"about {minutes / 60:.0f} hours"
