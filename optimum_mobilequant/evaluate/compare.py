"""One checkpoint in several arithmetics on the same text: float, simulation, integers, ONNX Runtime, HTP emulator.

Each runner of :data:`~.runners.RUNNERS` that is asked for is scored by its own perplexity, and each pair by how far
their logits are apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer

from ..exporters.source import prefix_tokens
from ..graph.ir import Encoding
from ..graph.load import QUANTO, load_graph, method_of
from ..log import progress_bar
from ..numerics import dequantize
from .perplexity import exp_or_inf, token_ids
from .runners import RUNNERS, LogitsRunner, Request


@dataclass(frozen=True)
class RunnerResult:
    """One runner on the text.

    Attributes:
        perplexity: of each token. tokens: predictions scored. seconds: wall time of the forward passes.
    """

    perplexity: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class PairResult:
    """How far the logits of one runner are from those of a reference.

    Attributes:
        sqnr_db: power of the reference's logits over the power of the difference, in dB; inf if there is none.
        argmax: share of positions with the same most likely token.
        max_lsb: largest difference in steps of the logits' grid; None if the two are not on the same grid.
        equal: share of equal codes; None likewise.
    """

    sqnr_db: float
    argmax: float
    max_lsb: int | None
    equal: float | None


@dataclass(frozen=True)
class Comparison:
    """What every runner gives on the text, and how far apart they are.

    Attributes:
        runners: by name. pairs: by ``"<name>/<reference>"``.
    """

    runners: Mapping[str, RunnerResult]
    pairs: Mapping[str, PairResult]

    def to_dict(self) -> dict[str, Any]:
        """``{"simulate": {"perplexity": ...}, ..., "pairs": {"integer/simulate": {...}}}``."""
        pairs = {name: asdict(pair) for name, pair in self.pairs.items()}
        return {**{name: asdict(result) for name, result in self.runners.items()}, "pairs": pairs}


def compare(
    checkpoint: str | PathLike[str],
    text_or_ids: str | Sequence[int] | Tensor,
    *,
    float32: bool = False,
    onnx: str | PathLike[str] | None = None,
    onnx_float64: bool = False,
    htp: bool = False,
    float_model: str | None = None,
    seq_len: int = 256,
    tokens: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> Comparison:
    """Perplexity of a checkpoint in each arithmetic on one text, and the distance of their logits.

    Protocol: as :func:`~.perplexity.perplexity` without BOS: chunks of ``seq_len`` tokens that do not overlap; every
    token but a chunk's first is scored. Pairs are compared at all positions.

    Args:
        checkpoint: folder that ``mobilequant quantize`` or ``save_pretrained`` wrote; the simulation, in float64, and
            the integer executor always run.
        text_or_ids: the text, read with the checkpoint's tokenizer, or token ids.
        float32: also the simulation in float32, which is what tuning sees; its distance from the simulation in
            float64 is the rounding of float32 and nothing else.
        onnx: folder of its export to onnx; runs in ONNX Runtime.
        onnx_float64: also that export with every float operation in float64: what the graph means.
        htp: also run on the HTP emulator.
        float_model: folder or Hub id of the float model it was made from; of a checkpoint with a prefix it also runs
            as ``float_prefix``, reading the prefix tokens before each chunk.
        seq_len: tokens of a chunk. tokens: use only so many tokens of the text.
        batch_size: chunks at a time; a matter of memory, not of the result.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no such checkpoint or export.
        ValueError: a checkpoint of another method, an export of another checkpoint or for fewer tokens, a float model
            that is quantized or has another vocabulary, ``seq_len`` beyond the model's positions, a text shorter
            than one chunk.
        ImportError: a package that a runner needs is missing (names the pip command).
    """
    folder = Path(checkpoint).expanduser()
    _check(folder, onnx, onnx_float64, float_model, seq_len, tokens)
    loaded = load_graph(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if isinstance(text_or_ids, str) else None
    windows = _windows(token_ids(loaded.model, tokenizer, text_or_ids), seq_len, tokens)
    request = Request(
        loaded, float32, None if onnx is None else Path(onnx).expanduser(), onnx_float64, htp, float_model, seq_len
    )
    made = {name: make(request) for name, make in RUNNERS.items()}
    runners = {name: runner for name, runner in made.items() if runner is not None}
    scores = {name: _Score() for name in runners}
    distances = {(b, a): _Distance(_same_grid(runners[a], runners[b])) for a, b in combinations(runners, 2)}
    for ids in progress_bar(windows.split(batch_size), "compare", unit="batch", show=progress):
        found: dict[str, Tensor] = {}
        for name, runner in runners.items():
            start = time.perf_counter()
            found[name] = runner(ids)
            scores[name].seconds += time.perf_counter() - start
            scores[name].add(_values(found[name], runner.encoding), ids)
        for (name, reference), distance in distances.items():
            for row in range(len(ids)):  # one at a time: the logits of a batch in float64 are large
                pair = ((found[n][row], runners[n].encoding) for n in (name, reference))
                distance.add(*pair)
    return Comparison(
        {name: score.result() for name, score in scores.items()},
        {f"{name}/{reference}": distance.result() for (name, reference), distance in distances.items()},
    )


def _check(
    folder: Path,
    onnx: str | PathLike[str] | None,
    onnx_float64: bool,
    float_model: str | None,
    seq_len: int,
    tokens: int | None,
) -> None:
    if method_of(folder) == QUANTO:
        raise ValueError(
            f"the activations of {str(folder)!r} are floats: give a checkpoint that `mobilequant quantize` saved"
        )
    if onnx is None and onnx_float64:
        raise ValueError("onnx_float64 needs an export: give the folder as onnx")
    if onnx is not None and not Path(onnx).expanduser().is_dir():
        raise FileNotFoundError(f"no folder {str(onnx)!r}: export the checkpoint to onnx first")
    if seq_len < 2 or (tokens is not None and tokens < seq_len):
        raise ValueError(f"seq_len must be at least 2 and tokens at least seq_len, not {seq_len} and {tokens}")
    positions = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions - (prefix := prefix_tokens(AutoConfig.from_pretrained(folder))):
        behind = f" behind a prefix of {prefix}" if prefix else ""
        raise ValueError(f"seq_len {seq_len} is beyond the model's {positions} positions{behind}; lower seq_len")
    if float_model is not None:
        config = AutoConfig.from_pretrained(float_model)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{float_model!r} is quantized: give the float model that the checkpoint was made from")


def _windows(ids: Tensor, seq_len: int, tokens: int | None) -> Tensor:
    if ids.numel() < seq_len:
        raise ValueError(
            f"the text has {ids.numel()} tokens, but one chunk takes {seq_len}; give more text or a smaller seq_len"
        )
    used = min(ids.numel(), tokens or ids.numel()) // seq_len * seq_len
    return ids[:used].view(-1, seq_len)


def _values(logits: Tensor, encoding: Encoding | None) -> Tensor:
    return logits.float() if encoding is None else dequantize(logits, encoding.scale, encoding.zero_point)


def _same_grid(a: LogitsRunner, b: LogitsRunner) -> bool:
    return a.encoding is not None and b.encoding is not None and a.encoding.same_as(b.encoding)


@dataclass
class _Score:
    total: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, logits: Tensor, ids: Tensor) -> None:
        targets = ids[:, 1:].flatten()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
        self.total += loss.double().sum().item()
        self.tokens += targets.numel()

    def result(self) -> RunnerResult:
        return RunnerResult(exp_or_inf(self.total / self.tokens), self.tokens, self.seconds)


@dataclass
class _Distance:
    same_grid: bool
    signal: float = 0.0
    noise: float = 0.0
    agree: int = 0
    positions: int = 0
    largest: int = 0
    equal: int = 0
    codes: int = 0

    def add(self, found: tuple[Tensor, Encoding | None], reference: tuple[Tensor, Encoding | None]) -> None:
        a, b = (_values(*pair).double() for pair in (found, reference))
        self.signal += float(b.square().sum())
        self.noise += float((a - b).square().sum())
        self.agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.positions += a[..., 0].numel()
        if self.same_grid:
            steps = (found[0].to(torch.int64) - reference[0].to(torch.int64)).abs()
            self.largest = max(self.largest, int(steps.max()))
            self.equal += int((steps == 0).sum())
            self.codes += steps.numel()

    def result(self) -> PairResult:
        ratio = (
            math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        )
        return PairResult(
            ratio,
            self.agree / self.positions,
            self.largest if self.same_grid else None,
            self.equal / self.codes if self.same_grid else None,
        )
