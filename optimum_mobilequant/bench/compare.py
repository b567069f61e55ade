"""Time and memory of a checkpoint and of its peers, measured by turns in one run."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..log import progress_bar
from ..registration import METHOD
from ..run.resources import peak_memory, reset_peak_memory
from .peers import PEERS, Subject, check_installed, load
from .runners import Runner, TransformersRunner

OURS = "mobilequant"
# Tokens whose time does not count: the first ones after a prompt allocate.
_DROPPED = 2


@dataclass
class Speed:
    """What was measured of one contender.

    Attributes:
        prefill, decode: tokens per second of each repetition.
        weight_bytes: resident weights. peak_bytes: these and what a prompt and its continuation take beside them at
            most; None where the system does not tell.
    """

    weight_bytes: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def summary(self) -> dict[str, Any]:
        """Medians."""
        return {
            "prefill_tokens_per_s": statistics.median(self.prefill),
            "decode_tokens_per_s": statistics.median(self.decode),
            "peak_bytes": self.peak_bytes,
            "resident_weight_bytes": self.weight_bytes,
        }

    def ratios(self, peer: Speed) -> dict[str, float]:
        """This over ``peer``, medians of the repetitions' own ratios; above 1 in a speed is faster."""
        found = {
            name: statistics.median(a / b for a, b in zip(getattr(self, name), getattr(peer, name), strict=True))
            for name in ("prefill", "decode")
        }
        found["resident_weights"] = self.weight_bytes / peer.weight_bytes
        if self.peak_bytes and peer.peak_bytes:
            found["peak"] = self.peak_bytes / peer.peak_bytes
        return found


@dataclass
class Measured:
    """Speeds of all contenders, and the ratios of the checkpoint's to each peer's."""

    speeds: dict[str, Speed]
    ratios: dict[str, dict[str, float]]

    def add(self, group: dict[str, Speed]) -> None:
        """Take in contenders that were measured together, the checkpoint among them."""
        own = group.pop(OURS)
        self.ratios |= {name: own.ratios(peer) for name, peer in group.items()}
        if (known := self.speeds.get(OURS)) is None:
            self.speeds[OURS] = own
        else:
            known.prefill += own.prefill
            known.decode += own.decode
            known.peak_bytes = max(known.peak_bytes or 0, own.peak_bytes or 0) or None
        self.speeds |= group


def compare_speed(
    folder: str | Path,
    against: Sequence[str] = ("bf16",),
    *,
    prompt: int = 256,
    tokens: int = 32,
    repeat: int = 5,
    threads: int | None = None,
    seed: int = 0,
    apart: bool = False,
) -> dict[str, Any]:
    """Time a quantized checkpoint and its peers on the CPU, by turns, in random order within each repetition.

    Prompts are random tokens. Float peers run the checkpoint's rounded weights.

    Args:
        folder: a checkpoint of this package. against: names of :data:`.peers.PEERS`.
        prompt: tokens that are read at once. tokens: tokens that are written, one by one, after each prompt.
        repeat: repetitions that count; one before them does not.
        threads: of torch and of ONNX Runtime; None keeps torch's.
        apart: the checkpoint and one peer after the other, so that no more than two models are in memory; otherwise
            all contenders are at once.

    Returns:
        ``contenders`` (name -> :meth:`Speed.summary`), ``ratios`` (peer -> :meth:`Speed.ratios` of the checkpoint, by
        the turns that both took) and the conditions.

    Raises:
        ValueError: a folder without a checkpoint of this package; an unknown peer; more tokens than positions.
        ImportError: a peer is not installed; names the pip command. Both before any work.
    """
    check_installed(against)
    folder = Path(folder)
    bits = _check(folder, prompt + tokens)
    if tokens <= _DROPPED:
        raise ValueError(f"tokens must be above {_DROPPED}, which are not counted, not {tokens}")
    before, load_before = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(threads or before)
    try:
        with tempfile.TemporaryDirectory(prefix="mobilequant-bench-") as scratch:
            subject = Subject(folder, bits, Path(scratch), prompt, tokens, threads or before)
            ours, speeds = TransformersRunner(load(folder)), Measured({}, {})
            groups = [[name] for name in against] if apart else [list(against)]
            for group in groups:
                runners: dict[str, Runner] = {OURS: ours}
                for name in progress_bar(group, "load"):
                    runners[name] = PEERS[name].make(subject)
                speeds.add(_measure(runners, _vocabulary(folder), subject, repeat, seed))
                del runners
    finally:
        torch.set_num_threads(before)
    return {
        "checkpoint": folder.name,
        "weight_bits": bits,
        "prompt": prompt,
        "tokens": tokens,
        "repeat": repeat,
        "threads": threads or before,
        "load_average": [load_before, os.getloadavg()[0]],
        "apart": apart,
        "contenders": {name: speed.summary() for name, speed in speeds.speeds.items()},
        "ratios": {name: speeds.ratios[name] for name in against},
    }


def _measure(
    runners: dict[str, Runner], vocabulary: int, subject: Subject, repeat: int, seed: int
) -> dict[str, Speed]:
    speeds = {name: Speed(runner.weight_bytes) for name, runner in runners.items()}
    generator, shuffle = torch.Generator().manual_seed(seed), random.Random(seed)
    bar = progress_bar(range(repeat + 1), "measure")
    for turn in bar:
        ids = torch.randint(vocabulary, (subject.prompt,), generator=generator)
        for name in shuffle.sample(list(runners), len(runners)):
            prefill, decode, beside = _time(runners[name], ids, subject.tokens)
            if turn == 0:  # compiles, allocates, warms up
                continue
            speed = speeds[name]
            speed.prefill.append(prefill)
            speed.decode.append(decode)
            if beside is not None:
                speed.peak_bytes = max(speed.peak_bytes or 0, speed.weight_bytes + beside)
    return speeds


def _time(runner: Runner, ids: Tensor, tokens: int) -> tuple[float, float, int | None]:
    """Tokens per second of reading and of writing, and the bytes taken meanwhile."""
    counts = reset_peak_memory()
    present = peak_memory()
    started = time.perf_counter()
    token = runner.read(ids)
    prefill = len(ids) / (time.perf_counter() - started)
    for step in range(tokens):
        if step == _DROPPED:
            started = time.perf_counter()
        token = runner.write(token)
    decode = (tokens - _DROPPED) / (time.perf_counter() - started)
    return prefill, decode, peak_memory() - present if counts else None


def _check(folder: Path, length: int) -> int:
    """Weight bits of the projections of a checkpoint."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json: give the folder of a quantized checkpoint")
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ValueError(f"{str(folder)!r} was not quantized by optimum-mobilequant: give a quantized checkpoint")
    positions = getattr(config, "max_position_embeddings", None) or length
    if length > positions:
        raise ValueError(f"prompt and tokens are {length} together, but the model has {positions} positions")
    from ..config import MobileQuantConfig

    scheme = MobileQuantConfig.from_dict(quantization).resolve_scheme()
    return int(scheme.weights["up"].bits)


def _vocabulary(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).vocab_size)
