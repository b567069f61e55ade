"""Perplexity against bytes of mixed-precision weights: allocations by sensitivity, at random, and uniform bits.

    python benchmarks/allocation.py --out allocation.json

Each row quantizes the embedded demo model, or ``--model``, with one recipe (``rtn``: the weights' bits are all that
differs). ``budget`` is the mean of bits for each weight of a projection. A random allocation of a budget takes the
projections in the order of a seed and gives each 8 instead of 4 bits while they fit. ``against`` is the perplexity
relative to the straight line between uniform rows of fewer and of more bits, at the same bytes: below 1 is better.
``KL`` is the mean of KL(float || quantized) on that text in nats: without the scatter of a gap, which is the text's.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quality import EMBEDDED, Text, cells_of_perplexity, divergence
from table import Table, markdown
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import MobileQuantConfig, perplexity, quantize
from optimum_mobilequant.allocate import allocate
from optimum_mobilequant.allocate.budget import units_of
from optimum_mobilequant.allocate.sensitivity import MEASURES
from optimum_mobilequant.families import family_of, geometry_of
from optimum_mobilequant.plan import PRESETS, build_plan

BUDGETS = (4.0, 4.5, 5.0, 5.5, 6.0, 7.0)
SEEDS = (0, 1, 2)
HEADER = ("how", "choices", "budget", "seed", "mean bits", "bytes", "perplexity", "gap", "KL", "against", "min")
PRESET = "w8a8"


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    text = Text(args.dataset, args.text, args.max_chars)
    settings = {"recipe": args.recipe, "effort": args.effort, "seq_len": args.seq_len, "samples": args.samples}
    keys = ("how", "choices", "budget", "seed")
    table = Table(args.out, settings, append=args.append, keys=keys, header=HEADER, cells=cells)
    table.use_text(args.model.name, text.record())
    wanted = [("uniform", [bits], float(bits), 0) for bits in (3, 4, 8)]
    for choices in ([3, 4, 8], [4, 8]):  # sensitivities are measured for the first, and serve the second
        budgets = [b for b in args.budgets if b > min(choices)]
        wanted += [(name, choices, b, 0) for b in budgets for name in MEASURES]
        wanted += [("random", choices, b, seed) for b in budgets for seed in SEEDS if len(choices) == 2]
    for key in wanted:
        if not table.has(*key):
            table.add(*key, values=measure(*key, text, table, args))
    print(table.markdown())


def measure(
    how: str, choices: list[int], budget: float, seed: int, text: Text, table: Table, args: argparse.Namespace
) -> dict[str, Any]:
    """Quantize once and score."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer, evaluation = AutoTokenizer.from_pretrained(args.model), text.read()

    def score(scored: Any) -> float:
        return perplexity(scored, tokenizer, evaluation, seq_len=args.seq_len, progress=False).perplexity

    reference = next((row["float"] for row in table.rows), None) or score(model)
    family = family_of(model)
    plan = build_plan(family, geometry_of(model, family), PRESETS[PRESET])
    units = units_of(model, plan, [3, 4, 8], by_layer=False)
    options: dict[str, Any] = {"dataset": text.calibration, "bos": False, "seq_len": args.seq_len}
    options |= {"samples": args.samples} if args.samples else {}
    losses = next((row["losses"] for row in table.rows if row["how"] == how and row["losses"]), None)
    if how in MEASURES and losses is None:
        options |= {"bits": f"auto:{budget:g}", "bit_choices": choices, "sensitivity": how}
    elif how in MEASURES:
        measured = units_of(model, plan, [3, 4, 8], by_layer=MEASURES[how].by_layer)
        known = {name: dict(zip([3, 4, 8], values, strict=True)) for name, values in losses.items()}
        limit = budget * sum(unit.weights for unit in measured)
        chosen = allocate(measured, known, choices, limit, "bits")
        options["overrides"] = {path: {"weight_bits": chosen[u.name]} for u in measured for path in u.paths}
    else:
        bits = {unit.name: choices[0] for unit in units}
        if how == "random":
            left = (budget - choices[0]) * sum(unit.weights for unit in units)
            for unit in random.Random(seed).sample(units, len(units)):
                if (extra := unit.weights * (choices[1] - choices[0])) <= left:
                    bits[unit.name], left = choices[1], left - extra
        options["overrides"] = {name: {"weight_bits": value} for name, value in bits.items()}
    original = copy.deepcopy(model)
    started = time.monotonic()
    model = quantize(model, tokenizer, MobileQuantConfig(PRESET, recipe=args.recipe, effort=args.effort, **options))
    minutes = (time.monotonic() - started) / 60
    saved = model.config.quantization_config
    found = build_plan(plan.family, plan.geometry, PRESETS[PRESET], saved.overrides)
    chosen = {unit.name: found.weights[unit.name].rule.bits for unit in units}
    spent = sum(unit.bytes[chosen[unit.name]] for unit in units)
    value = score(model)
    return {
        "mean_bits": sum(unit.weights * chosen[unit.name] for unit in units) / sum(unit.weights for unit in units),
        "bytes": spent,
        "float": reference,
        "perplexity": value,
        "gap": value / reference - 1,
        "divergence": divergence(model, original, tokenizer, evaluation, args.seq_len),
        "against": against(value, spent, table),
        "chosen": chosen,
        "losses": saved.recorded.get("allocation", {}).get("losses"),
        "minutes": minutes,
    }


def against(value: float, spent: int, table: Table) -> float | None:
    """``value`` relative to the line between the uniform rows around ``spent`` bytes."""
    line = sorted((row["bytes"], row["perplexity"]) for row in table.rows if row["how"] == "uniform")
    for (low, worse), (high, better) in zip(line, line[1:], strict=False):
        if low <= spent <= high:
            return value / (worse + (better - worse) * (spent - low) / (high - low))
    return None


def cells(row: dict[str, Any]) -> list[str]:
    relative = "" if row["against"] is None else f"{row['against']:.4f}"
    names = [row["how"], ", ".join(map(str, row["choices"])), f"{row['budget']:g}", str(row["seed"])]
    sizes = [f"{row['mean_bits']:.3f}", f"{row['bytes']:,}"]
    score, gap, minutes = cells_of_perplexity(row)
    return [*names, *sizes, score, gap, f"{row['divergence']:.4f}", relative, minutes]


def page(rows: Sequence[dict[str, Any]]) -> str:
    """A table of docs/bits.md: divergence at each budget, in thousandths of a nat."""
    found: dict[tuple[str, float], list[str]] = {}
    for row in rows:
        if row["how"] != "uniform" and len(row["choices"]) == (3 if row["budget"] == 4 else 2):
            found.setdefault((row["how"], row["budget"]), []).append(f"{1000 * row['divergence']:.1f}")
    hows = (*reversed(MEASURES), "random")
    lines = [[f"{b:g}", *(", ".join(found.get((how, b), ["—"])) for how in hows)] for b in BUDGETS]
    return markdown(["mean bits, at most", *hows], lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the rows")
    parser.add_argument("--append", action="store_true", help="continue that file: measure what it lacks")
    parser.add_argument("--model", type=Path, default=EMBEDDED, metavar="DIR")
    parser.add_argument("--dataset", default="python-stdlib", help="to calibrate and measure sensitivities on")
    parser.add_argument("--text", default="python-stdlib", metavar="FILE", help="to score")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), metavar="BITS")
    parser.add_argument("--recipe", default="rtn")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--samples", type=int, help="sequences to calibrate on, instead of the effort's")
    parser.add_argument("--max-chars", type=int, default=200_000, help="of the evaluation text")
    parser.add_argument("--threads", type=int, help="of torch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
