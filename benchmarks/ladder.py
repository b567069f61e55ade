"""Recipes x presets x seeds on small models: what each recipe adds, with mean and spread.

    python benchmarks/ladder.py --out ladder.json
    python benchmarks/ladder.py --out ladder.json --append --models DIR --recipes rtn best --seeds 0 1 2 \\
        --text NAME=calibration.txt,evaluation.txt,150000

Protocol and options as in quality.py; ``mobilequant ladder`` does the same for one model and one seed. ``gap`` is
perplexity / float perplexity - 1; ``gain`` the gap of the recipe below at the same preset and seed, less this one's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality import VARIANTS, Subject, Text, add_options, checked, models_of
from table import Table, markdown

from optimum_mobilequant.config.recipes import RECIPES
from optimum_mobilequant.evaluate.ladder import RUNG_PRESETS, RUNGS, Rung, added
from optimum_mobilequant.evaluate.ladder import cells as rung_cells
from optimum_mobilequant.lookup import lookup
from optimum_mobilequant.plan import PRESETS

KEYS = ("model", "variant", "preset", "recipe", "seed")
HEADER = ("model", "variant", "seed", "preset", "recipe", "perplexity", "gap", "gain", "minutes", "peak GiB", "extras")
SUMMARY = ("model", "variant", "preset", "recipe", "seeds", "gap, mean", "gap, spread", "gain, mean", "added")


def main() -> None:
    args = parse_args()
    models, texts = models_of(args)
    settings = {name: getattr(args, name) for name in ("effort", "seq_len", "quick", "factor", "share")}
    table = Table(args.out, settings, append=args.append, keys=KEYS, header=HEADER, cells=cells)
    for name, folder in models.items():
        if not args.only or name in args.only:
            table.use_text(name, texts[name].record())
            climb(name, folder, texts[name], table, args)
    print(summary(table))


def climb(name: str, folder: Path, text: Text, table: Table, args: argparse.Namespace) -> None:
    """Add the rows of one model that the table lacks."""
    subject = Subject(folder, text, args)
    for variant in args.variants:
        reference = table.find(name, variant, "float32", "float", 0)
        if reference is None:
            value = subject.score(subject.load(variant))
            row = {"perplexity": value, "gap": 0.0, "gain": None, "error": None, "added": []}
            reference = table.add(name, variant, "float32", "float", 0, values=row)
        for preset in args.presets:
            for seed in args.seeds:
                below: str | None = None
                for recipe in args.recipes:
                    if not table.has(name, variant, preset, recipe, seed):
                        config = subject.config(preset, seed, {"recipe": recipe})
                        values = subject.run(variant, config, reference["perplexity"])
                        under = None if below is None else table.find(name, variant, preset, below, seed)
                        values |= {"below": below, "gain": None, "added": []}
                        if under is not None:
                            known = subject.config(preset, seed, {"recipe": below})
                            values["added"] = added(known.resolve(), config.resolve())
                            if None not in (under["gap"], values["gap"]):
                                values["gain"] = under["gap"] - values["gap"]
                        table.add(name, variant, preset, recipe, seed, values=values)
                    below = recipe


def cells(row: dict[str, Any]) -> list[str]:
    known = {name: row[name] for name in Rung.__dataclass_fields__ if name in row}
    *shown, _ = rung_cells(Rung(**known))
    return [row["model"], row["variant"], str(row["seed"]), *shown]


def summary(table: Table) -> str:
    """Mean and spread (largest less smallest) over the seeds."""
    lines = []
    for key, rows in by_seeds(table.rows).items():
        gaps = [row["gap"] for row in rows if row["gap"] is not None]
        gains = [row["gain"] for row in rows if row["gain"] is not None]
        shown = [
            f"{100 * statistics.mean(gaps):.2f} %" if gaps else f"refused: {rows[0]['error']}",
            f"{100 * (max(gaps) - min(gaps)):.2f} %" if len(gaps) > 1 else "",
            f"{100 * statistics.mean(gains):.2f} %" if gains else "",
        ]
        lines.append([*key, str(len(rows)), *shown, ", ".join(rows[0]["added"])])
    return markdown(SUMMARY, lines)


def by_seeds(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows that differ in their seeds alone, by (model, variant, preset, recipe)."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEYS[:-1]), []).append(row)
    return groups


def page(
    rows: Sequence[dict[str, Any]],
    recipes: Sequence[str] = ("rtn", "mobilequant", "best"),
    presets: Sequence[str] = RUNG_PRESETS,
    variant: str = "plain",
) -> str:
    """A table of docs/results.md: mean gaps of each model, with half their spread over seeds."""
    groups = by_seeds(rows)
    floats = {
        key[0]: found[0]["perplexity"] for key, found in groups.items() if key[1:] == (variant, "float32", "float")
    }
    lines = []
    for model, value in floats.items():
        line = [model, f"{value:.2f}"]
        for preset in presets:
            means: dict[str, float] = {}
            for recipe in recipes:
                found = groups.get((model, variant, preset, recipe), [])
                gaps = [row["gap"] for row in found if row["gap"] is not None]
                if gaps:
                    means[recipe] = statistics.mean(gaps)
                spread = f" ({len(gaps)} seeds, ±{50 * (max(gaps) - min(gaps)):.2f})" if len(gaps) > 1 else ""
                line.append(f"{100 * means[recipe]:.2f} %{spread}" if gaps else "—")
            if _has_share(preset, recipes):
                last = recipes[-1]
                share = means[last] / means["rtn"] if {last, "rtn"} <= means.keys() else None
                line.append("—" if share is None else f"{share:.2f}x")
        lines.append(line)
    names = [
        name
        for preset in presets
        for name in [
            *(f"{preset.upper()} `{recipe}`" for recipe in recipes),
            *["of `rtn`'s"] * _has_share(preset, recipes),
        ]
    ]
    return markdown(["model", "float perplexity", *names], lines)


def _has_share(preset: str, recipes: Sequence[str]) -> bool:
    """Whether a table says which part of ``rtn``'s gap its last recipe leaves."""
    return preset == "w4a8" and recipes[-1] in ("best", "qad")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--recipes", nargs="+", default=list(RUNGS), metavar="RECIPE", help="from the bottom up")
    parser.add_argument("--presets", nargs="+", default=list(RUNG_PRESETS), metavar="PRESET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain"])
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="measure only these models")
    args = checked(parser)
    for kind, known, names in (("recipe", RECIPES, args.recipes), ("preset", PRESETS, args.presets)):
        for name in names:
            lookup(kind, known, name)
    return args


if __name__ == "__main__":
    main()
