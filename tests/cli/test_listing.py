"""Every table that users take names from can be listed."""

import json

import pytest

from optimum_mobilequant import cli
from optimum_mobilequant.cli.listing import TABLES
from optimum_mobilequant.config.recipes import EFFORTS, RECIPES
from optimum_mobilequant.exporters.options import EXPORTERS
from optimum_mobilequant.exporters.targets import TARGETS
from optimum_mobilequant.families import FAMILIES
from optimum_mobilequant.kernels.registry import BACKENDS
from optimum_mobilequant.plan import PRESETS

SOURCES = {
    "presets": PRESETS,
    "recipes": RECIPES,
    "efforts": EFFORTS,
    "families": {family.name: family for family in FAMILIES},
    "backends": BACKENDS,
    "exporters": EXPORTERS,
    "targets": TARGETS,
}


def test_all_tables_are_covered():
    assert TABLES.keys() == SOURCES.keys()


@pytest.mark.parametrize("what", SOURCES)
def test_a_list_names_every_row_and_says_something_about_it(what, capsys):
    assert cli.main(["list", what]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert cli.main(["list", what, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == lines
    assert lines.keys() == SOURCES[what].keys() and all(len(text) > 5 for text in lines.values())


def test_an_unknown_table_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["list", "recipe"])
    assert stop.value.code == 2 and "recipes" in capsys.readouterr().err
