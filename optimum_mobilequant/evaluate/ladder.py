"""The ladder: recipes x presets on one model and one text, and what each rung adds to the one below it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MobileQuantConfig
from ..config.recipes import RECIPES
from ..config.settings import Settings
from ..data.sources import dataset_record
from ..log import get_logger
from ..lookup import lookup
from ..plan.presets import PRESETS
from ..run.resources import reset_peak_memory
from .perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)

# From the baseline up: each does more than the one before it.
RUNGS = ("rtn", "smoothquant-edge", "mobilequant", "best")
RUNG_PRESETS = ("w8a8", "w4a8", "w8a8-full")
LADDER_FILE = "ladder.json"
# Of the settings: how much is spent, and what follows from the rest.
_NOT_STAGES = {"recipe", "effort", "seed", "samples", "seq_len", "batch_size", "eval_every", "gradient_checkpointing"}


@dataclass(frozen=True)
class Rung:
    """One quantization.

    Args:
        recipe, preset: of it; ``"float"`` and ``"float32"`` for the model itself.
        perplexity: on the text; None if the run was refused (see ``error``).
        gap: perplexity / float perplexity - 1.
        gain: gap of the recipe below it at this preset, less this one's; None where there is none.
        added: settings in which its recipe differs from the one below it, as ``"name=value"``.
        validation: perplexity of the held-out calibration text: float, before anything is learned, quantized.
        minutes: of the quantization.
        peak_memory_bytes: of the process (or the CUDA device) during it.
        mean_bits: of the weights of the projections.
        extras: what it needs at run time beyond the model: ``{"prefix slots": 4}``.
        error: why there is no result.
    """

    recipe: str
    preset: str
    perplexity: float | None = None
    gap: float | None = None
    gain: float | None = None
    added: tuple[str, ...] = ()
    validation: dict[str, float] = field(default_factory=dict)
    minutes: float | None = None
    peak_memory_bytes: int | None = None
    mean_bits: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def ladder(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    text: str,
    *,
    recipes: Sequence[str] = RUNGS,
    presets: Sequence[str] = RUNG_PRESETS,
    options: Mapping[str, Any] | None = None,
    seq_len: int = 256,
    run_dir: str | PathLike[str] | None = None,
    progress: bool = True,
    on_rung: Callable[[Rung], None] | None = None,
) -> list[Rung]:
    """Quantize a model with every recipe at every preset and score each result on one text.

    Args:
        load: gives the float model; called once for each rung, for quantization changes it.
        tokenizer: of the calibration text and of ``text``.
        dataset: calibration text, as of ``MobileQuantConfig``. text: held-out text to score.
        recipes: in the order of the ladder, from the bottom. presets: each a ladder of its own.
        options: further options of every ``MobileQuantConfig`` (effort, seed, samples, ...).
        seq_len: of the scored chunks, see :func:`~.perplexity.perplexity`.
        run_dir: folder that keeps the finished rungs and the stages of each; the same call goes on there.
        progress: show bars while scoring.
        on_rung: called with each rung as it is finished.

    Returns:
        The float model's row, then preset by preset the recipes in their order.

    Raises:
        ValueError: an unknown recipe or preset, options that contradict one of the recipes, ``run_dir`` of another
            ladder; before anything is computed.
    """
    options = dict(options or {})
    configs = {
        (recipe, preset): MobileQuantConfig(preset, recipe=recipe, dataset=dataset, **options)
        for preset in _known("preset", PRESETS, presets)
        for recipe in _known("recipe", RECIPES, recipes)
    }
    if dataset_text(dataset) == text:
        logger.warning("the calibration text is the evaluation text: the perplexities say nothing about new text")
    first = next(iter(configs.values()))
    about = {
        "dataset": dataset_record(dataset),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seq_len": seq_len,
        "options": {name: first.to_dict()[name] for name in options},
    }
    store = _Store(None if run_dir is None else Path(run_dir).expanduser(), json.loads(json.dumps(about)))
    rungs: list[Rung] = []

    def finish(rung: Rung) -> None:
        store.put(rung)
        rungs.append(rung)
        if on_rung is not None:
            on_rung(rung)

    def score(model: PreTrainedModel) -> float:
        return perplexity(model, tokenizer, text, seq_len=seq_len, progress=progress).perplexity

    reference = store.get("float", "float32") or Rung("float", "float32", score(load()), 0.0)
    finish(reference)
    assert reference.perplexity is not None
    for preset in presets:
        below: Rung | None = None
        for recipe in recipes:
            config = configs[recipe, preset]
            if (rung := store.get(recipe, preset)) is None:
                folder = None if store.folder is None else str(store.folder / f"{preset}-{recipe}")
                found = quantize_and_score(load, tokenizer, config, score, reference.perplexity, run_dir=folder)
                known = None if below is None else configs[below.recipe, preset].resolve()
                gain = None
                if below is not None and below.gap is not None and found["gap"] is not None:
                    gain = below.gap - found["gap"]
                rung = Rung(recipe, preset, gain=gain, added=tuple(added(known, config.resolve())), **found)
            finish(rung)
            below = rung
    return rungs


def quantize_and_score(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: MobileQuantConfig,
    score: Callable[[PreTrainedModel], float],
    reference: float,
    *,
    run_dir: str | None = None,
) -> dict[str, Any]:
    """One row of a table: quantize a fresh model and score it.

    The library's refusal of a bad result (diverged, worse than its start) is a result, too: ``error`` then says why,
    and the numbers are None.

    Args:
        reference: perplexity of the float model.

    Returns:
        perplexity, gap, minutes, peak_memory_bytes, mean_bits, validation, extras, error: see :class:`Rung`.
    """
    from ..pipeline import quantize

    nothing: dict[str, Any] = dict.fromkeys(("perplexity", "gap", "minutes", "peak_memory_bytes", "mean_bits"))
    nothing |= {"validation": {}, "extras": {}, "error": None}
    model = load()
    reset_peak_memory(model.device)
    started = time.monotonic()
    try:
        model = quantize(model, tokenizer, config, run_dir=run_dir)
    except (FloatingPointError, RuntimeError) as error:
        return nothing | {"error": str(error)}
    minutes = (time.monotonic() - started) / 60
    value, saved = score(model), model.config.quantization_config
    if not math.isfinite(value):
        return nothing | {"error": "the perplexity overflows"}
    return nothing | {
        "perplexity": value,
        "gap": value / reference - 1,
        "minutes": minutes,
        "peak_memory_bytes": saved.recorded["peak_memory_bytes"],
        "mean_bits": mean_bits(model),
        "validation": saved.recorded["validation_perplexity"],
        "extras": extras(saved),
    }


def mean_bits(model: PreTrainedModel) -> float:
    """Bits for each weight of the projections of a quantized model, scales not counted."""
    from ..hf_quantizer import plan_of

    plan = plan_of(model, model.config.quantization_config)
    sizes = {
        path: (model.get_submodule(path).weight.shape.numel(), spec.rule.bits)  # type: ignore[operator]
        for path, spec in plan.weights.items()
        if spec.role in ("attention", "gate", "up", "down")
    }
    return sum(count * bits for count, bits in sizes.values()) / sum(count for count, _ in sizes.values())


def extras(config: MobileQuantConfig) -> dict[str, Any]:
    """What a checkpoint needs at run time beyond an ordinary model of its architecture; empty for most."""
    tokens = config.prefix_ids()
    shift = {"additions to keys": 1} if config.key_shift else {}
    return {"prefix slots": len(tokens), **shift} if tokens else shift


def added(below: Settings | None, here: Settings) -> list[str]:
    """Settings of a recipe that differ from those of the recipe below it, as ``"name=value"``."""
    if below is None:
        return []
    before, now = asdict(below), asdict(here)
    return [f"{name}={now[name]}" for name in now if name not in _NOT_STAGES and now[name] != before[name]]


def table(rungs: Iterable[Rung]) -> str:
    """For a terminal or a page: Markdown."""
    header = ("preset", "recipe", "perplexity", "gap", "gain", "minutes", "peak GiB", "run-time extras", "added")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cells(rung))} |" for rung in rungs])


def cells(rung: Rung) -> list[str]:
    """Columns of :func:`table`."""
    if rung.perplexity is None:
        return [rung.preset, rung.recipe, "refused", rung.error or "", *[""] * 5]
    percent = ["" if value is None else f"{100 * value:.2f} %" for value in (rung.gap, rung.gain)]
    size = "" if rung.peak_memory_bytes is None else f"{rung.peak_memory_bytes / 2**30:.2f}"
    minutes = "" if rung.minutes is None else f"{rung.minutes:.1f}"
    more = ", ".join(f"{value} {name}" for name, value in rung.extras.items()) or "none"
    number = f"{rung.perplexity:.4f}" if rung.perplexity < 1e4 else f"{rung.perplexity:.3g}"
    return [rung.preset, rung.recipe, number, *percent, minutes, size, more, ", ".join(rung.added)]


def dataset_text(dataset: Any) -> str | None:
    """The text of a plain text file; None for every other data set."""
    path = Path(dataset).expanduser() if isinstance(dataset, str) and dataset.endswith(".txt") else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _known(kind: str, known: Mapping[str, Any], names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise ValueError(f"a ladder needs at least one {kind}; known: {', '.join(known)}")
    for name in names:
        lookup(kind, known, name)
    if len(set(names)) < len(names):
        raise ValueError(f"a {kind} is named twice: {', '.join(names)}")
    return names


class _Store:
    """The finished rungs in a folder; without one nothing is kept."""

    def __init__(self, folder: Path | None, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self.rungs: dict[tuple[str, str], Rung] = {}
        if folder is None or not (folder / LADDER_FILE).is_file():
            return
        stored = json.loads((folder / LADDER_FILE).read_text(encoding="utf-8"))
        if stored["about"] != about:
            differs = [name for name in about if stored["about"].get(name) != about[name]]
            raise ValueError(f"run_dir {folder} holds another ladder ({', '.join(differs)}): use another run_dir")
        for row in stored["rungs"]:
            rung = Rung(**(row | {"added": tuple(row["added"])}))
            self.rungs[rung.recipe, rung.preset] = rung

    def get(self, recipe: str, preset: str) -> Rung | None:
        return self.rungs.get((recipe, preset))

    def put(self, rung: Rung) -> None:
        self.rungs[rung.recipe, rung.preset] = rung
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "rungs": [asdict(kept) for kept in self.rungs.values()]}
        temporary = self.folder / f".{LADDER_FILE}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.folder / LADDER_FILE)
