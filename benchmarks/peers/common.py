"""What every worker does around its library's method: read the job, score, quantize, look at the result, score again.

A worker runs in the environment of its library, which need not have this project's package: only torch, transformers
and numpy are used here.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Attributes:
        model: folder of the float model.
        calibration, evaluation: int64 [chunks, tokens].
        method: which of the worker's.
        weight_bits, activation_bits: of it.
        scratch: folder for whatever a library writes.
    """

    model: Path
    calibration: Tensor
    evaluation: Tensor
    method: str
    weight_bits: int
    activation_bits: int
    seed: int
    scratch: Path

    def batches(self) -> list[Tensor]:
        """The calibration chunks, ``BATCH`` at a time."""
        return list(self.calibration.split(BATCH))


@dataclass(frozen=True)
class Quantized:
    """What a method made.

    Attributes:
        model: called like the float model.
        weights: the weights a forward pass multiplies with, [out, in], by layer.
        activations: how many tensors are quantized on the way, outside the weights.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    activations: int


Method = Callable[[PreTrainedModel, Job], Quantized]


def main(methods: Mapping[str, Method], *packages: str) -> None:
    """The worker: ``argv[1]`` is the job, a JSON file; the result goes to ``argv[2]``."""
    described = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(described.pop("threads"))
    arrays = {name: torch.from_numpy(np.load(described.pop(name))) for name in ("calibration", "evaluation")}
    paths = {name: Path(described.pop(name)) for name in ("model", "scratch")}
    result = work(methods[described["method"]], Job(**arrays, **paths, **described))
    names = ("torch", "transformers", *packages)
    result["versions"] = {"python": sys.version.split()[0]} | {name: version(name) for name in names}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def work(method: Method, job: Job) -> dict[str, float | int | str]:
    """Float perplexity, the quantized model's, and what is quantized in it.

    Raises:
        ValueError: a weight has more values in an output channel than its bits allow.
    """
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    before = perplexity(model, job.evaluation)
    started, used = time.monotonic(), time.process_time()
    found = method(model, job)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    return {
        "float_perplexity": before,
        "perplexity": perplexity(found.model, job.evaluation),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "layers": len(found.weights),
        "activations": found.activations,
        "levels": max(map(levels, found.weights.values())),
    }


@torch.no_grad()
def perplexity(model: nn.Module, chunks: Tensor) -> float:
    """exp of the mean loss of each token but a chunk's first; losses in float32, their sum in float64."""
    total = 0.0
    for batch in chunks.split(BATCH):
        logits = model(input_ids=batch).logits[:, :-1]
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), batch[:, 1:].flatten(), reduction="none")
        total += loss.double().sum().item()
    mean = total / chunks[:, 1:].numel()
    return math.exp(mean) if mean < 709 else math.inf


def levels(weight: Tensor) -> int:
    """The most distinct values that an output channel of a weight has.

    Values closer than 1e-4 of the channel's largest are one: a scale divided out and multiplied in again leaves such
    differences, a grid of 8 bits none below 4e-3.
    """
    rows = weight.detach().float().flatten(1)
    span = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    rows = (rows / span).sort(dim=1).values
    return int(((rows.diff(dim=1) > 1e-4).sum(dim=1) + 1).max())


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder's layers, by path: what a peer quantizes; the head stays float."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{path}"
    }


def tokenizer_of(job: Job) -> PreTrainedTokenizerBase:
    """Libraries ask for one even where token ids are given."""
    return AutoTokenizer.from_pretrained(job.model)
