"""Stages 15 to 25: start values of transforms, activation ranges and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibrate import Statistics, choose_ranges, collect
from ..config.recipes import SITES
from ..nn.matrix import Matrix
from ..tune import Learnables, attach_matrices, least_output_error, refuse_different
from ..tune.output_ranges import Ranges
from .adaptive import adaptive_scales
from .edges import Edge, edges_of
from .matrices import matrix_edges_of
from .shift import shift_keys
from .signs import quarter_turns_of, signs_of, turn
from .smooth import smooth_scales

if TYPE_CHECKING:
    from ..run.prepare import Prepared

# Share of the median channel's magnitude below which a channel counts as silent.
SILENT = 0.01


def rotate(student: nn.Module, job: Prepared) -> dict[str, Matrix]:
    """Before all else: the bases in which activations are looked at."""
    s = job.settings
    return attach_matrices(
        student, matrix_edges_of(job.plan.family, job.plan.geometry, s.transforms, s.rotate, seed=s.seed)
    )


def transform(
    model: nn.Module,
    student: nn.Module,
    statistics: Statistics,
    job: Prepared,
    matrices: Mapping[str, Matrix] | None = None,
) -> Learnables:
    """Stage 20: start values of the transforms, of the activation ranges behind them, and of the clipping."""
    s = job.settings
    if "signs" in s.transforms:
        signs, statistics = signs_of(statistics, job.plan, s.rotate)
        quarters, statistics = quarter_turns_of(statistics, job.plan)
        for entry in signs + quarters:
            turn(model, [entry], student)
            job.turns.append(entry)  # an error halfway turns back what was turned, and no more
    if job.plan.key_shift:
        statistics = shift_keys(student, statistics, job.plan)
    edges = edges_of(job.plan.family, job.plan.geometry, [site for site in s.transforms if site in SITES])
    scales = start_scales(edges, model, student, statistics, job, turned=bool(matrices))
    learnables = Learnables(student, job.plan, edges, scales, matrices)
    refuse_different(student, model, job.data.validation[:1], job.plan.prefix)
    if (kept := job.run.load("transform")) is not None:
        statistics = Statistics.from_tensors(kept[0])
    elif edges or job.turns or job.plan.key_shift:
        statistics = collect(student, job.data.train, batch_size=s.batch_size, description="calibrate again")
        job.run.save("transform", statistics.to_tensors(), {})
    by_value = "mse" if s.range_init == "output" else s.range_init
    ranges = choose_ranges(job.plan, statistics, by_value, norm=s.range_norm)
    learn_ranges = s.learn_ranges or s.finetune_ranges
    learnables.set_ranges(student, ranges, learn=learn_ranges)
    if s.learn_clips or s.clip_init != "none":
        learnables.add_clips(s.clip_init)
    learnables.release(student)
    if s.range_init == "output":
        learnables.set_ranges(student, search_ranges(student, ranges, job), learn=learn_ranges)
        learnables.release(student)
    return learnables


def start_scales(
    edges: list[Edge], model: nn.Module, student: nn.Module, statistics: Statistics, job: Prepared, *, turned: bool
) -> dict[str, Tensor]:
    """Stage 15, where it takes long: log-scales that the transforms start from, in the bases that matrices made."""

    def weight_of(path: str) -> Tensor:
        module: Any = student.get_submodule(path)
        return module.weight.folded()

    alpha = job.settings.smooth_alpha or 0.0
    if job.settings.smoothing != "adaptive":
        # Behind a prefix the units that made its tokens massive fire no more.
        silent = SILENT if job.plan.prefix else 0.0
        of = weight_of if turned else None
        return smooth_scales(edges, model, statistics.channel_absmax, alpha, weight_of=of, silent=silent)
    if (kept := job.run.load("smooth")) is not None:
        return kept[0]
    scales = adaptive_scales(edges, student, job.plan, job.data.train, batch_size=job.settings.batch_size)
    job.run.save("smooth", scales, {})
    return scales


def search_ranges(student: nn.Module, ranges: Ranges, job: Prepared) -> Ranges:
    """Stage 25: with ``range_init="output"``, start ranges by the error of each layer's output."""
    if (kept := job.run.load("ranges")) is not None:
        return {name: (ends[0], ends[1]) for name, ends in kept[0].items()}
    found = least_output_error(student, job.plan, ranges, job.data.train, job.settings.batch_size)
    job.run.save("ranges", {name: torch.stack(ends) for name, ends in found.items()}, {})
    return found
