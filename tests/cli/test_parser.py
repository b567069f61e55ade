"""What the parser accepts and refuses, before any command runs."""

import subprocess
import sys

import pytest

from optimum_mobilequant import cli
from optimum_mobilequant.cli.quantize import field
from optimum_mobilequant.config.recipes import EFFORTS, RECIPES


def quantize_args(model, dataset, out, *more):
    return ["quantize", str(model), "--preset", "w4a8", "--dataset", str(dataset), "--out", str(out), *map(str, more)]


def test_parsing_and_help_load_no_torch():
    code = (
        "import sys; before = set(sys.modules)\n"
        "from optimum_mobilequant.cli import main\n"
        "try: main(['quantize', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: mobilequant quantize" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_parser_reads_every_option():
    options = ["--recipe", "rtn", "--effort", "none", "--run-dir", "r", "--seed", "3", "--device", "cuda:1"]
    options += ["--overwrite", "--traceback", "--bits", "auto:4.5", "--set", "a=1", "--set", "b=x"]
    args = cli.build_parser().parse_args(quantize_args("m", "d", "o", *options))
    assert (args.model, args.preset, args.dataset, args.out) == ("m", "w4a8", "d", "o")
    assert (args.recipe, args.effort, args.run_dir, args.seed, args.device) == ("rtn", "none", "r", 3, "cuda:1")
    assert args.overwrite and args.traceback and args.bits == "auto:4.5"
    assert args.fields == [("a", 1), ("b", "x")]
    args = cli.build_parser().parse_args(["eval", "m", "--text", "t", "--seq-len", "64", "--bos", "--json"])
    assert (args.model, args.text, args.seq_len, args.bos, args.json) == ("m", "t", 64, True, True)


def test_ladder_takes_lists_of_names():
    words = ["ladder", "m", "--dataset", "d", "--text", "t", "--recipes", "rtn, best", "--presets", "w4a8", "--json"]
    args = cli.build_parser().parse_args(words)
    assert (args.recipes, args.presets, args.effort, args.json) == (["rtn", "best"], ["w4a8"], "default", True)


def test_parser_extends_a_given_one():
    import argparse

    outer = argparse.ArgumentParser("outer")
    assert cli.build_parser(outer) is outer
    assert outer.parse_args(["doctor", "--json"]).json


def test_help_names_every_recipe_and_effort():
    quantize = cli.build_parser()._subparsers._group_actions[0].choices["quantize"]
    helps = {action.dest: action.help for action in quantize._actions}
    assert all(name in helps["recipe"] for name in RECIPES)
    assert all(name in helps["effort"] for name in EFFORTS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=null", None),
        ('a=["lm_head"]', ["lm_head"]),
        ('a={"lm_head": 8}', {"lm_head": 8}),
        ("a=minmax", "minmax"),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ('a="8"', "8"),
        ("a=[1,", "[1,"),
    ],
)
def test_set_reads_json_else_text(text, value):
    assert field(text) == ("a", value)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["quantize", "m"],
        quantize_args("m", "d", "o", "--set", "nothing"),
        quantize_args("m", "d", "o", "--set", "=3"),
        quantize_args("m", "d", "o", "--over"),
        ["eval", "m", "--text", "t", "--seq-len", "0"],
        ["eval", "m", "--text", "t", "--seq-len", "1.5"],
    ],
)
def test_usage_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


# Errors
