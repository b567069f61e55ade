"""Perplexity of recipes and presets on real small models, plain and with injected outliers.

    python benchmarks/quality.py --out quality.json
    python benchmarks/quality.py --out quality.json --append --models DIR \\
        --text NAME=calibration.txt,evaluation.txt,150000

Measures the embedded demo model and every model folder in DIR. Protocol: no special tokens, chunks of --seq-len tokens
that do not overlap; calibration and evaluation text are disjoint (by default the two parts of the Python standard
library). ``gap`` is perplexity / float perplexity - 1. Rows are written as they are measured; with --append, rows that
the file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from outliers import inject_outliers
from table import Table
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_mobilequant import MobileQuantConfig, perplexity
from optimum_mobilequant.config.recipes import SIGN_SITES, SITES
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.evaluate.ladder import quantize_and_score
from optimum_mobilequant.evaluate.perplexity import token_ids

EMBEDDED = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
VARIANTS = ("plain", "injected")
HEADER = ("model", "variant", "preset", "case", "perplexity", "gap", "minutes")
FLOAT_ROW = {"perplexity": None, "gap": 0.0, "minutes": 0.0}
NO_ROW = {"perplexity": None, "gap": None, "minutes": None}


@dataclass(frozen=True)
class Case:
    """One row: a config. ``name`` is the recipe, or what differs from it."""

    name: str
    preset: str
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    *(Case(recipe, preset, {"recipe": recipe})
      for preset in ("w8a8", "w4a8") for recipe in ("rtn", "smoothquant-edge", "gptq", "qqq", "mobilequant", "best")),
    Case("rtn", "w8a8-full", {"recipe": "rtn"}),
    *(Case(recipe, "w8a8-full", {"recipe": recipe}) for recipe in ("mobilequant", "best")),
    # Tokens kept in the cache; for models with massive activations (benchmarks/massive.py makes one).
    *(Case(f"{recipe}, prefix", preset, {"recipe": recipe, "prefix": True})
      for preset in ("w8a8", "w8a8-full") for recipe in ("rtn", "mobilequant", "best")),
    # The published plan rounds queries and keys to 8 bits before the rotary embedding as well.
    Case("8-bit q/k", "w8a8", {
        "recipe": "mobilequant", "overrides": {"*.q_proj.output": {"bits": 8}, "*.k_proj.output": {"bits": 8}},
    }),
    # Weights alone, nearly: activations have 16 bits. No recipe here uses data for the weights; "self" no data at all.
    *(Case(recipe, "w4a16", {"recipe": recipe}) for recipe in ("rtn", "adpq")),
    Case("adpq, calibrated on itself", "w4a8", {"recipe": "adpq", "dataset": "self"}),
    Case("rtn, calibrated on itself", "w4a8", {"recipe": "rtn", "dataset": "self"}),
    Case("adpq", "w4a8", {"recipe": "adpq"}),
    Case("stored as e0m4", "w4a16", {"recipe": "rtn", "weight_format": "e0m4"}),
    Case("stored as adpq", "w4a16", {"recipe": "rtn", "weight_format": "adpq"}),
    Case("stored as adpq, no outliers", "w4a16", {"recipe": "rtn", "weight_format": "adpq", "outlier_share": 0}),
    *(Case(f"{recipe}, 3 bits", "w4a16", {"recipe": recipe, "overrides": {"*_proj": {"weight_bits": 3}}})
      for recipe in ("rtn", "adpq")),
    *(Case(f"stored as adpq, 3 bits, {100 * share:g} % outliers", "w4a16", {
        "recipe": "rtn", "weight_format": "adpq", "outlier_share": share,
        "overrides": {"*_proj": {"weight_bits": 3}},
    }) for share in (0, 0.01, 0.05)),
    # What rounding in closed form adds behind learned transforms, and under learned rounding.
    *(Case(f"mobilequant, {rounding}", "w4a8", {"recipe": "mobilequant", "rounding": rounding})
      for rounding in ("gptq", "qronos")),
    *(Case(f"best, from {start}", "w4a8", {"recipe": "best", "rounding_start": start})
      for start in ("gptq", "qronos")),
    # What could be added to best, or moved within it; none of it costs anything at run time.
    *(Case(f"best, {name}", "w4a8", {"recipe": "best", **options}) for name, options in (
        ("r1r2", {"rotate": "r1r2"}), ("bias correction", {"bias_correction": True}),
        ("output ranges", {"range_init": "output"}), ("400 steps of rounding", {"rounding_steps": 400}),
        ("1600 sequences", {"samples": 1600}), ("100 + 300 steps", {"steps": 100, "rounding_steps": 300}),
    )),
    # What the transforms give that best adds to the paper's.
    *(Case(f"{recipe}, {name}", preset, {"recipe": recipe, **options})
      for recipe in ("mobilequant", "best") for preset in ("w8a8", "w4a8") for name, options in (
        ("neither signs nor key shift", {"transforms": list(SITES), "key_shift": False}),
        ("key shift alone", {"transforms": list(SITES), "key_shift": True}),
        ("signs and key shift", {"transforms": [*SITES, *SIGN_SITES], "key_shift": True}),
    )),
    Case("gptq after magr", "w4a8", {"recipe": "gptq", "magr": True}),
    Case("gptq, groups of 128", "w4a8-g128", {"recipe": "gptq"}),
    # What end-to-end tuning and learned ranges contribute. Each layer of the block-wise run sees as many sequences as
    # the whole model does end to end; its objective is the one a single layer has, so that change has a row as well.
    Case("fixed ranges", "w4a8", {"recipe": "mobilequant", "learn_ranges": False}),
    Case("hidden-state objective", "w4a8", {"recipe": "mobilequant", "objective": "hidden_mse"}),
    Case("block-wise", "w4a8", {"recipe": "mobilequant", "tuning": "block-wise"}),
    # Rotations, other start ranges and bias correction: docs/transforms.md.
    *(Case(name, preset, {"recipe": "mobilequant", **options}) for preset in ("w8a8", "w4a8") for name, options in (
        ("r1", {"rotate": "r1"}), ("r2", {"rotate": "r2"}), ("r1r2", {"rotate": "r1r2"}),
        ("dense v/o", {"transforms": [*SITES, "v_o_dense"]}),
        ("q/k turns", {"transforms": [*SITES, "q_k_rotation"]}),
        ("lp ranges", {"range_init": "lp"}), ("output ranges", {"range_init": "output"}),
        ("bias correction", {"bias_correction": True}),
    )),
    # What comes behind the rounding (finetune.py has more of it), and calibration without any text.
    Case("qad", "w4a8", {"recipe": "qad"}),
    Case("qad", "w8a8", {"recipe": "qad"}),
    Case("qad, more text", "w4a8", {
        "recipe": "qad", "finetune_dataset": "python-stdlib", "finetune_split": "train",
    }),
    Case("self-written text", "w4a8", {"recipe": "mobilequant", "dataset": "self"}),
    Case("rtn, self-written text", "w8a8", {"recipe": "rtn", "dataset": "self"}),
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Calibration data set and evaluation text of one model."""

    calibration: str
    evaluation: str
    max_chars: int

    def read(self) -> str:
        return self.source()[: self.max_chars]

    def following(self, characters: int) -> str:
        """What comes behind the evaluation text in its source."""
        return self.source()[self.max_chars : self.max_chars + characters]

    def source(self) -> str:
        if self.evaluation == "python-stdlib":
            return "\n".join(stdlib_texts("test"))
        return Path(self.evaluation).read_text(encoding="utf-8")

    def record(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.read().encode()).hexdigest()
        names = {"calibration": Path(self.calibration).name, "evaluation": Path(self.evaluation).name}
        return names | {"max_chars": self.max_chars, "evaluation_sha256": digest}


def main() -> None:
    args = parse_args()
    models, texts = models_of(args)
    settings = {
        "effort": args.effort, "seed": args.seed, "seq_len": args.seq_len, "quick": args.quick,
        "factor": args.factor, "share": args.share,
    }  # fmt: skip
    keys, about = ("model", "variant", "preset", "case"), {"cases": [asdict(case) for case in CASES]}
    table = Table(args.out, settings, append=args.append, keys=keys, header=HEADER, cells=cells, about=about)
    missing: dict[str, list[tuple[str, Case]]] = {}
    for name in models:
        wanted = [(v, c) for v in VARIANTS for c in CASES if args.wants(name, v, c.preset, c.name)]
        missing[name] = [(v, c) for v, c in wanted if not table.has(name, v, c.preset, c.name)]
        if wanted:
            table.use_text(name, texts[name].record())
    for name, folder in models.items():
        if missing[name]:
            measure(name, folder, texts[name], missing[name], table, args)
    print(table.markdown())


class Subject:
    """A model to measure, plain or with injected outliers, and its texts."""

    def __init__(self, folder: Path, text: Text, args: argparse.Namespace):
        if not (folder / "model.safetensors").is_file():
            raise SystemExit(f"{folder} holds no model.safetensors")
        self.folder, self.text, self.args = folder, text, args
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.evaluation = text.read()

    def load(self, variant: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if variant == "injected":
            inject_outliers(model, factor=self.args.factor, share=self.args.share, seed=self.args.seed)
        return model

    def score(self, model: PreTrainedModel, prefix: Sequence[int] = ()) -> float:
        options: dict[str, Any] = {"seq_len": self.args.seq_len, "prefix": prefix, "progress": False}
        return perplexity(model, self.tokenizer, self.evaluation, **options).perplexity

    def run(self, variant: str, config: MobileQuantConfig, reference: float) -> dict[str, Any]:
        """A row: what quantizing with ``config`` gives, and the float model behind the prefix if it chose one."""
        prefix: list[int] = []

        def score(model: PreTrainedModel) -> float:
            prefix.extend(model.config.quantization_config.prefix_ids())
            return self.score(model)

        row = quantize_and_score(lambda: self.load(variant), self.tokenizer, config, score, reference)
        return row | ({"float_prefix": self.score(self.load(variant), prefix)} if prefix else {})

    def config(self, preset: str, seed: int, chosen: dict[str, Any]) -> MobileQuantConfig:
        """The config of a case; --quick makes all of it small."""
        args = self.args
        options: dict[str, Any] = {"dataset": self.text.calibration, "bos": False, "seq_len": args.seq_len}
        options |= {"seed": seed, "effort": args.effort, **chosen}
        if "r1" in options.get("rotate", "") and AutoConfig.from_pretrained(self.folder).tie_word_embeddings:
            options["untie"] = True
        if args.quick:
            settings = MobileQuantConfig(preset, **options).resolve()
            steps = ("steps", "rounding_steps", "finetune_steps")
            options |= {"samples": 8} | {name: 4 for name in steps if getattr(settings, name)}
        return MobileQuantConfig(preset, **options)


def measure(
    name: str, folder: Path, text: Text, cases: list[tuple[str, Case]], table: Table, args: argparse.Namespace
) -> None:
    """Add the float row of each variant and the rows of ``cases`` to the table."""
    subject = Subject(folder, text, args)
    for variant, case in cases:
        reference = table.find(name, variant, "float32", "float")
        if reference is None:
            value = subject.score(subject.load(variant))
            reference = table.add(name, variant, "float32", "float", values=FLOAT_ROW | {"perplexity": value})
        config = subject.config(case.preset, args.seed, case.options)
        values = subject.run(variant, config, reference["perplexity"])
        if values["error"] is not None:
            table.add(name, variant, case.preset, case.name, values=NO_ROW | {"error": values["error"]})
            continue
        kept = {key: values[key] for key in ("perplexity", "gap", "minutes", "peak_memory_bytes", "extras")}
        kept["validation_perplexity"] = values["validation"]
        if "float_prefix" in values:
            kept["float_prefix"] = values["float_prefix"]
        table.add(name, variant, case.preset, case.name, values=kept)


def models_of(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Text]]:
    """The folders to measure and their texts, by name."""
    folders = [EMBEDDED, *(sorted(args.models.iterdir()) if args.models else [])]
    models = {path.name: path for path in folders if (path / "config.json").is_file()}
    texts = {name: args.text.get(name, Text("python-stdlib", "python-stdlib", args.max_chars)) for name in models}
    if unknown := args.text.keys() - models.keys():
        raise SystemExit(f"--text names no model here: {', '.join(unknown)}; models: {', '.join(models)}")
    return models, texts


@torch.no_grad()
def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int
) -> float:
    """Mean of KL(reference || model) over the positions of ``text`` in pieces of ``length`` tokens, in nats."""
    ids = token_ids(model, tokenizer, text)
    windows, total = ids[: ids.numel() // length * length].view(-1, length), 0.0
    for batch in windows.split(8):
        q, p = (m(input_ids=batch).logits.float().log_softmax(-1) for m in (model, reference))
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return total / windows.numel()


def cells(row: dict[str, Any]) -> list[str]:
    names = [row["model"], row["variant"], row["preset"], row["case"]]
    if row["perplexity"] is None:
        return [*names, "refused", row["error"], ""]
    return [*names, *cells_of_perplexity(row)]


def cells_of_perplexity(row: dict[str, Any]) -> list[str]:
    """Perplexity, gap and minutes of a row."""
    perplexity_text = f"{row['perplexity']:.4f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.3g}"
    return [perplexity_text, f"{100 * row['gap']:.2f} %", f"{row['minutes']:.1f}"]


def text_argument(argument: str) -> tuple[str, Text]:
    name, equals, rest = argument.partition("=")
    parts = rest.split(",")
    if not equals or len(parts) != 3 or not parts[2].isdecimal():
        raise argparse.ArgumentTypeError(f"{argument!r} is not of the form NAME=CALIBRATION,EVALUATION,CHARS")
    for path in parts[:2]:
        if path != "python-stdlib" and not Path(path).is_file():
            raise argparse.ArgumentTypeError(f"no file {path!r}")
    return name, Text(parts[0], parts[1], int(parts[2]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that benchmarks of quality share."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the rows")
    parser.add_argument("--append", action="store_true", help="continue that file: measure what it lacks")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of model folders, measured as well")
    parser.add_argument(
        "--text", type=text_argument, action="append", default=[], metavar="NAME=CALIBRATION,EVALUATION,CHARS"
    )
    parser.add_argument("--max-chars", type=int, default=200_000, help="of the default evaluation text")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--factor", type=float, default=30.0, help="of the injected outliers")
    parser.add_argument("--share", type=float, default=0.03, help="of the channels that become outliers")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="4 steps on 8 sequences: does it run at all?")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="model/variant/preset/case, with wildcards; repeatable"
    )
    args = checked(parser)
    args.wants = lambda *key: not args.only or any(fnmatch("/".join(key), pattern) for pattern in args.only)
    return args


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; texts by the model's name."""
    args = parser.parse_args()
    args.text = dict(args.text)
    if not math.isfinite(args.factor) or args.factor <= 0:
        parser.error("--factor must be positive")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
