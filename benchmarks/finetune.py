"""What fine-tuning adds behind one and the same state of ``best``: settings compared without the scatter of the start.

    python benchmarks/finetune.py --out finetune.json --runs DIR --models MODELS --only stories260k \\
        --text stories260k=CALIBRATION.txt,EVALUATION.txt,150000

Protocol and texts as in quality.py. ``best`` runs once for a model and a seed, with its stages kept in ``--runs``;
each case starts from a copy of them. ``divergence`` is the mean of KL(float || quantized) over the evaluation text in
nats; the other text is what follows the evaluation text in the same source, up to --other-chars characters.
``changed`` is the share of the projections' codes that are not those of ``best``; ``minutes`` are without what was
kept from another case, stages and written text.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quality import Subject, Text, add_options, checked, divergence, models_of
from safetensors.torch import load_file
from table import Table, markdown
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mobilequant import MobileQuantConfig, perplexity, quantize
from optimum_mobilequant.config.settings import Settings
from optimum_mobilequant.data.selfgen import BATCH, start_tokens, write_sequences
from optimum_mobilequant.data.sequences import calibration_data, held_out_of
from optimum_mobilequant.evaluate.perplexity import token_ids
from optimum_mobilequant.hf_quantizer import plan_of
from optimum_mobilequant.run.prepare import prepare
from optimum_mobilequant.run.run_dir import STAGES

KEYS = ("model", "preset", "case", "seed")
HEADER = (*KEYS, "divergence", "gap", "gap, other text", "changed", "kept step", "minutes")
START = "best"
# What the stages up to the rounding are computed from without knowing it: a copy of them serves any value of these.
FREE = ("recipe", "eval_every", "finetune", "feature", "adapter_rank", "teachers", "temperature", "cross_entropy",
        "attention_", "token_share", "lr_adapters", "lr_finetune", "lr_offsets")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Options of the recipe "qad". ``pieces``: share of the written sequences that begin with pieces of the
    calibration text, 0 or 1; None is what the library does."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pieces: int | None = None


CASES = (
    Case("qad"),
    Case("800 steps", {"finetune_steps": 800}),
    Case("calibration text", {"finetune_dataset": "calibration"}),
    Case("no pieces", pieces=0),
    Case("all from pieces", pieces=1),
    Case("scales", {"recipe": "best", "finetune": "scales"}),
    Case("low rank", {"adapter_rank": 32}),
    Case("low rank, higher rate", {"adapter_rank": 32, "lr_adapters": 2e-3}),
    Case("calibration text, cross-entropy 0.2", {"finetune_dataset": "calibration", "cross_entropy": 0.2}),
    Case("800 steps, calibration text", {"finetune_steps": 800, "finetune_dataset": "calibration"}),
    Case("1600 steps", {"finetune_steps": 1600}),
    # For --preset w8a8, whose steps are sixteen times finer.
    *(Case(f"finer grid, offsets at {rate}", {"lr_offsets": rate}) for rate in (0.05, 0.16)),
)  # fmt: skip


def main() -> None:
    args = parse_args()
    models, texts = models_of(args)
    settings = {name: getattr(args, name) for name in ("effort", "seq_len", "quick", "other_chars", "key_shift")}
    table = Table(args.out, settings, append=args.append, keys=KEYS, header=HEADER, cells=cells)
    for name, folder in models.items():
        if not args.only or name in args.only:
            table.use_text(name, texts[name].record())
            measure(name, Measured(folder, texts[name], args), table, args)
    print(table.markdown())


class Measured(Subject):
    """A model to measure on two texts."""

    def __init__(self, folder: Path, text: Text, args: argparse.Namespace):
        super().__init__(folder, text, args)
        self.float = self.load("plain")
        self.other = text.following(args.other_chars)
        if token_ids(self.float, self.tokenizer, self.other).numel() < args.seq_len:
            self.other = ""  # the evaluation text reaches to the end of its source
        self.reference = self.score(self.float), self.score_other(self.float)

    def config(self, preset: str, seed: int, chosen: dict[str, Any]) -> MobileQuantConfig:
        return super().config(preset, seed, chosen if self.args.key_shift else {**chosen, "key_shift": False})

    def score_other(self, model: PreTrainedModel) -> float | None:
        options: dict[str, Any] = {"seq_len": self.args.seq_len, "progress": False}
        return perplexity(model, self.tokenizer, self.other, **options).perplexity if self.other else None

    def written(self, settings: Settings, pieces: int) -> Tensor:
        bos, ends = start_tokens(self.float, self.tokenizer, False)
        text: dict[str, Any] = {"samples": settings.samples, "seq_len": settings.seq_len, "seed": settings.seed}
        given = calibration_data(self.text.calibration, self.tokenizer, bos=False, **text).train
        return write_sequences(
            self.float,
            # a data set keeps a part for validation, which is not used
            count=settings.finetune_samples + held_out_of(settings.finetune_samples),
            seq_len=settings.seq_len,
            seed=settings.seed + 1,
            bos=bos,
            ends=ends,
            never=self.tokenizer.all_special_ids,
            given=given if pieces else None,
            given_every=1,
        )

    def values(self, model: PreTrainedModel, start: dict[str, Tensor] | None, minutes: float) -> dict[str, Any]:
        recorded = model.config.quantization_config.recorded
        kept = recorded["finetune"] or {}
        other, reference = self.score_other(model), self.reference[1]
        return {
            "divergence": divergence(model, self.float, self.tokenizer, self.evaluation, self.args.seq_len),
            "gap": self.score(model) / self.reference[0] - 1,
            "gap_other": None if other is None or reference is None else other / reference - 1,
            "changed": None if start is None else changed(start, codes_of(model)),
            "kept_step": kept.get("best_step"),
            "history": kept.get("history"),
            "minutes": minutes,
        }


def measure(name: str, subject: Measured, table: Table, args: argparse.Namespace) -> None:
    """Add the rows of one model that the table lacks."""
    for seed in args.seeds:
        runs = args.runs / name / args.preset / str(seed)
        config = subject.config(args.preset, seed, {"recipe": START})
        wanted = [c for c in CASES if args.wants(c.name) and not table.has(name, args.preset, c.name, seed)]
        if not wanted and table.has(name, args.preset, START, seed):
            continue
        model, minutes = timed(subject, config, runs / START)
        start = codes_of(model)
        if not table.has(name, args.preset, START, seed):
            table.add(name, args.preset, START, seed, values=subject.values(model, None, minutes))
        for case in wanted:
            options = {"recipe": "qad", **case.options}
            if case.pieces is not None:
                resolved = subject.config(args.preset, seed, options).resolve()
                options["finetune_dataset"] = subject.written(resolved, case.pieces)
            config = subject.config(args.preset, seed, options)
            folder = runs / case.name.replace(",", "").replace(" ", "-")
            branch(subject, config, runs, folder)
            model, minutes = timed(subject, config, folder)
            table.add(name, args.preset, case.name, seed, values=subject.values(model, start, minutes))


def timed(subject: Measured, config: MobileQuantConfig, folder: Path) -> tuple[PreTrainedModel, float]:
    started = time.monotonic()
    model = quantize(subject.load("plain"), subject.tokenizer, config, run_dir=str(folder))
    return model, (time.monotonic() - started) / 60


def branch(subject: Measured, config: MobileQuantConfig, runs: Path, folder: Path) -> None:
    """Open a run in ``folder``, with the stages of ``best`` up to the rounding and text that is written already.

    Raises:
        SystemExit: those stages would not be this run's.
    """
    before, now = (
        {k: v for k, v in asdict(c.resolve()).items() if not k.startswith(FREE)}
        for c in (subject.config(config.preset, config.seed, {"recipe": START}), config)
    )
    if before != now:
        raise SystemExit(f"{folder.name} differs from {START} in {[k for k in now if now[k] != before[k]]}")
    opened = prepare(subject.load("plain"), subject.tokenizer, config, str(folder)).run
    for file in sorted((runs / START).glob("[0-9][0-9]_*.safetensors")):
        if int(file.name[:2]) <= STAGES["round"] and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    wanted = config.resolve().finetune_samples
    if config.finetune_text(config.resolve()) == "self" and not opened.finished("write_more"):
        # A batch depends on its number alone: whole batches of a longer text are those of a shorter one.
        for ids in texts_of(runs):
            if len(ids) == wanted or (len(ids) > wanted and wanted % BATCH == 0):
                opened.save("write_more", {"ids": ids[:wanted].clone()}, {})
                break


def texts_of(runs: Path) -> Iterator[Tensor]:
    """What the model wrote in the runs that are there."""
    for file in sorted(runs.glob(f"*/{STAGES['write_more']:02d}_write_more.safetensors")):
        yield load_file(file)["ids"]


def codes_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Integers of the projections, by path."""
    weights = plan_of(model, model.config.quantization_config).weights
    paths = [path for path, spec in weights.items() if spec.role in ("attention", "gate", "up", "down")]
    return {path: model.get_submodule(path).weight.codes.clone() for path in paths}  # type: ignore[operator, union-attr]


def changed(before: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    count = sum(int((before[path] != codes).sum()) for path, codes in now.items())
    return count / sum(codes.numel() for codes in now.values())


def cells(row: dict[str, Any]) -> list[str]:
    percent = ["—" if row[name] is None else f"{100 * row[name]:.2f} %" for name in ("gap", "gap_other")]
    share = "" if row["changed"] is None else f"{100 * row['changed']:.2f} %"
    step = "" if row["kept_step"] is None else str(row["kept_step"])
    return [*(str(row[name]) for name in KEYS), f"{row['divergence']:.4f}", *percent, share, step,
            f"{row['minutes']:.1f}"]  # fmt: skip


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/finetune.md."""
    shown = [cells(row) for row in rows]
    return markdown(("model", *HEADER[2:3], *HEADER[4:8]), [[row[0], row[2], *row[4:8]] for row in shown])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="keeps the stages of all runs")
    parser.add_argument("--preset", default="w4a8")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="measure only these models")
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="of the cases behind it, with wildcards")
    parser.add_argument("--no-key-shift", dest="key_shift", action="store_false", help="key_shift=False in all cases")
    parser.add_argument("--other-chars", type=int, default=300_000)
    args = checked(parser)
    args.wants = lambda case: not args.cases or any(fnmatch(case, pattern) for pattern in args.cases)
    return args


if __name__ == "__main__":
    main()
