"""``mobilequant list``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .common import AddCommand, print_json

Row = tuple[str, str]


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("list", "List the names that other commands and the config take.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("what", choices=tuple(TABLES), help="which names")
    parser.add_argument("--json", action="store_true", help="print JSON: name to description")


def run_command(args: argparse.Namespace) -> int:
    rows = TABLES[args.what]()
    if args.json:
        print_json(dict(rows))
        return 0
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    return 0


def _presets() -> list[Row]:
    from optimum_mobilequant.plan import PRESETS

    return [(name, scheme.summary) for name, scheme in PRESETS.items()]


def _recipes() -> list[Row]:
    from optimum_mobilequant.config.recipes import RECIPES

    return [(name, recipe.summary) for name, recipe in RECIPES.items()]


def _efforts() -> list[Row]:
    from optimum_mobilequant.config.recipes import EFFORTS

    spent = "{0.summary}: {0.recipe}, {0.samples} samples of {0.seq_len} tokens, {0.steps} + {0.rounding_steps} steps"
    return [(name, spent.format(effort)) for name, effort in EFFORTS.items()]


def _families() -> list[Row]:
    from optimum_mobilequant.families import FAMILIES

    return [(family.name, f"model_type {', '.join(family.model_types)}") for family in FAMILIES]


def _backends() -> list[Row]:
    from optimum_mobilequant.kernels.registry import BACKENDS

    def here(name: str) -> str:
        return f" (not here: {reason})" if (reason := BACKENDS[name].available()) else ""

    return [(name, backend.summary + here(name)) for name, backend in BACKENDS.items()]


def _exporters() -> list[Row]:
    from optimum_mobilequant.exporters.options import EXPORTERS

    return [(name, exporter.summary) for name, exporter in EXPORTERS.items()]


def _targets() -> list[Row]:
    from optimum_mobilequant.exporters.targets import TARGETS

    return [(name, f"system on chip: {', '.join(target.socs)}") for name, target in TARGETS.items()]


TABLES: dict[str, Callable[[], list[Row]]] = {
    "presets": _presets,
    "recipes": _recipes,
    "efforts": _efforts,
    "families": _families,
    "backends": _backends,
    "exporters": _exporters,
    "targets": _targets,
}
