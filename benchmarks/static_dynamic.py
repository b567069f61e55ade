"""Static against dynamic activations: a ladder from float to learned static ranges, on one model.

    python benchmarks/static_dynamic.py --out static_dynamic.json
    python benchmarks/static_dynamic.py --out static_dynamic.json --append --only 'demo_model/plain/w8a8/*'

Protocol and options as in quality.py. "dynamic": every activation that a static run rounds with a range fixed
beforehand takes its range from each token's own extremes instead, on the same grid and with the same integer weights,
so that nothing but the ranges differs. "dynamic at linears (torchao)": torchao's own per-token int8 activations at the
inputs of linear layers, everything else in float, which is what most libraries call dynamic quantization; needs
``pip install torchao``. ``--reuse FILE`` takes static rows that quality.py or ladder.py measured with the same
settings, seed and text from their file, those of the present version alone.
"""

from __future__ import annotations

import argparse
import importlib.util
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import torch
from outliers import SITES as OUTLIER_SITES
from quality import VARIANTS, Subject, Text, add_options, cells, checked, models_of
from table import Table, markdown, reusable
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_mobilequant import quantize
from optimum_mobilequant.nn import quantizers_of
from optimum_mobilequant.nn.quantizer import Quantizer
from optimum_mobilequant.numerics import affine_qparams, fake_quantize

KEYS = ("model", "variant", "preset", "case")
HEADER = (*KEYS, "perplexity", "gap", "minutes")
PRESETS = ("w8a8", "w4a8")
TORCHAO, DYNAMIC, DYNAMIC_SMOOTH = "dynamic at linears (torchao)", "dynamic", "dynamic, smoothed"
DYNAMIC_RECIPES = {DYNAMIC: "rtn", DYNAMIC_SMOOTH: "smoothquant-edge"}
STATIC: dict[str, dict[str, Any]] = {
    "static min-max": {"recipe": "rtn"},
    "smoothquant-edge": {"recipe": "smoothquant-edge"},
    "searched ranges": {"recipe": "mobilequant", "steps": 0},
    "learned ranges": {"recipe": "mobilequant", "learn_transforms": False, "learn_clips": False},
    "mobilequant": {"recipe": "mobilequant"},
    "best": {"recipe": "best"},
}
CASES = (TORCHAO, *DYNAMIC_RECIPES, *STATIC)


def main() -> None:
    args = parse_args()
    models, texts = models_of(args)
    settings = {
        "effort": args.effort, "seed": args.seed, "seq_len": args.seq_len, "quick": args.quick,
        "factor": args.factor, "share": args.share, "outlier_sites": list(OUTLIER_SITES),
    }  # fmt: skip
    table = Table(args.out, settings, append=args.append, keys=KEYS, header=HEADER, cells=cells)
    if args.reuse:
        reuse(args.reuse, table, texts)
    keys = [
        (name, v, p, c)
        for name in models
        for v in VARIANTS
        for p in PRESETS
        for c in CASES
        if args.wants(name, v, p, c)
    ]
    if any(key[-1] == TORCHAO and not table.has(*key) for key in keys) and not importlib.util.find_spec("torchao"):
        raise SystemExit(f'"{TORCHAO}" needs torchao: pip install torchao, or leave it out with --only')
    for name in dict.fromkeys(key[0] for key in keys):
        table.use_text(name, texts[name].record())
        measure(name, models[name], texts[name], [key[1:] for key in keys if key[0] == name], table, args)
    print(table.markdown(), ladder(table.rows), sep="\n\n")


def reuse(path: Path, table: Table, texts: dict[str, Text]) -> None:
    """Copy the rows of a file of quality.py or ladder.py that are missing here and mean the same."""
    names = {"float": "float", **{options["recipe"]: case for case, options in STATIC.items() if len(options) == 1}}
    records = {name: text.record() for name, text in texts.items()}
    for row, source in reusable(path, table.settings, records):
        key = (row["model"], row["variant"], row["preset"], names.get(row.get("case", row.get("recipe"))))
        if None not in key and row["preset"] in (*PRESETS, "float32") and not table.has(*key):
            table.use_text(row["model"], records[row["model"]])
            table.add(*key, values={name: row[name] for name in ("perplexity", "gap", "minutes")} | source)


def ladder(rows: list[dict[str, Any]]) -> str:
    """The table of docs/static_dynamic.md: a rung a line, gaps of one model; "—" where nothing was measured."""
    shown = []
    for case in CASES:
        cells_of_case = []
        for preset, variant in product(PRESETS, VARIANTS):
            key = (variant, preset, case)
            gaps = [row["gap"] for row in rows if (row["variant"], row["preset"], row["case"]) == key]
            cells_of_case.append(_percent(gaps[0]) if gaps else "—")
        shown.append([case, *cells_of_case])
    columns = [
        f"{preset.upper()}{', outliers' * (variant != 'plain')}" for preset, variant in product(PRESETS, VARIANTS)
    ]
    return markdown(["", *columns], shown)


def _percent(gap: float | None) -> str:
    return "refused" if gap is None else f"{100 * gap:.2f} %"


def measure(
    name: str, folder: Path, text: Text, wanted: list[tuple[str, str, str]], table: Table, args: argparse.Namespace
) -> None:
    """Add the rows of one model that the table lacks, and the float rows they refer to."""
    subject = Subject(folder, text, args)
    for variant, preset, case in wanted:
        if table.has(name, variant, preset, case):
            continue
        reference = table.find(name, variant, "float32", "float")
        if reference is None:
            row = {"perplexity": subject.score(subject.load(variant)), "gap": 0.0, "minutes": 0.0}
            reference = table.add(name, variant, "float32", "float", values=row)
        if case in STATIC:
            found = subject.run(variant, subject.config(preset, args.seed, STATIC[case]), reference["perplexity"])
            row = {key: found[key] for key in ("perplexity", "gap", "minutes", "extras", "error")}
        else:
            model = subject.load(variant)
            value = subject.score(
                at_linears(model, preset) if case == TORCHAO else everywhere(subject, model, preset, case)
            )
            row = {"perplexity": value, "gap": value / reference["perplexity"] - 1, "minutes": 0.0}
        table.add(name, variant, preset, case, values=row)


def at_linears(model: PreTrainedModel, preset: str) -> PreTrainedModel:
    """torchao: symmetric weights by row (the head's 8 bits), asymmetric int8 activations by token."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    def is_head(module: nn.Module, name: str) -> bool:
        return module is model.get_output_embeddings()

    def is_projection(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not is_head(module, name)

    projections = torch.int4 if preset == "w4a8" else torch.int8
    for dtype, chosen in ((torch.int8, is_head), (projections, is_projection)):
        quantize_(model, Int8DynamicActivationIntxWeightConfig(dtype, PerAxis(0)), filter_fn=chosen)
    return model


def everywhere(subject: Subject, model: PreTrainedModel, preset: str, case: str) -> PreTrainedModel:
    """A statically quantized model whose activations take their ranges from each token instead."""
    options: dict[str, Any] = {"recipe": DYNAMIC_RECIPES[case], "backend": "simulate"}
    if options["recipe"] == "rtn":  # its weights depend on no text, and ranges are taken from each token
        options["samples"] = 8
    model = quantize(model, subject.tokenizer, subject.config(preset, subject.args.seed, options))
    for quantizer in quantizers_of(model):
        if quantizer.spec.fixed is None:
            quantizer.register_forward_hook(by_token)
            quantizer.forward = lambda x: x  # type: ignore[method-assign]
    return model


def by_token(quantizer: Quantizer, args: Any, x: Tensor) -> Tensor:
    """Forward hook: round by a token's extremes; ``x`` is ``[batch, token, ...]`` or ``[batch, head, token, ...]``"""
    others = (1, 3) if x.ndim == 4 else tuple(range(2, x.ndim))
    scale, zero_point = affine_qparams(x.amin(others, keepdim=True), x.amax(others, keepdim=True), quantizer.spec.grid)
    return fake_quantize(x, scale, zero_point, quantizer.spec.grid)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="model/variant/preset/case, with wildcards; repeatable"
    )
    parser.add_argument("--reuse", type=Path, metavar="FILE", help="results to take static rows from")
    args = checked(parser)
    args.wants = lambda *key: not args.only or any(fnmatch("/".join(key), pattern) for pattern in args.only)
    return args


if __name__ == "__main__":
    main()
