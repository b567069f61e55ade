"""What a run says while it works: estimates before the first bar, a bar for each stage, one table at the end."""

import logging as standard
import re
import sys
from dataclasses import replace

import pytest
from transformers.utils import logging

from optimum_mobilequant import quantize
from optimum_mobilequant.config import recipes
from optimum_mobilequant.log import ROOT, get_logger, progress_bar
from optimum_mobilequant.run.duration import in_words, remaining_work, seconds_of_a_pass
from optimum_mobilequant.run.resources import held_memory, peak_memory
from optimum_mobilequant.run.summary import summary
from tests import tiny

# (recipe, options) -> bars, in the order of the run
STAGES = {
    "rtn": ({}, ["calibrate", "pack"]),
    "qad": (
        {"steps": 2, "rounding_steps": 2, "feature_steps": 2, "finetune_steps": 8, "prefix": [3]},
        ["massive tokens", "calibrate", "learn", "round", "features", "finetune", "pack"],
    ),
    "qqq": ({"steps": None}, ["calibrate", "smooth", "round", "pack"]),
    "omniquant-edge": ({"steps": 2}, ["calibrate", "learn layer 1/2", "learn layer 2/2", "pack"]),
}


@pytest.fixture
def shown(capsys):
    """Runs a recipe with this package's INFO lines on stderr; returns what is on stderr."""
    handler = standard.StreamHandler(sys.stderr)
    logger, before = standard.getLogger(ROOT), logging.is_progress_bar_enabled()
    level = logger.level
    logger.addHandler(handler)

    def run(recipe, *, bars, verbosity=standard.INFO, **options):
        logger.setLevel(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        model = quantize(tiny.build("llama-gqa"), None, tiny.config("w4a8", recipe=recipe, **options))
        return model.config.quantization_config.recorded, capsys.readouterr().err

    yield run
    logger.removeHandler(handler)
    logger.setLevel(level)
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("recipe", STAGES)
def test_every_stage_has_a_bar_with_the_time_left_and_the_estimate_comes_first(shown, recipe):
    options, stages = STAGES[recipe]
    recorded, text = shown(recipe, bars=True, **options)
    places = [text.find("this run takes"), *(text.find(f"{stage}: ") for stage in stages)]
    assert -1 not in places and places == sorted(places), list(zip(["estimate", *stages], places, strict=True))
    assert re.search(r"\d\d:\d\d<(\?|\d\d:\d\d)", text)  # elapsed < left
    assert recorded["minutes_estimate"] > 0 and recorded["peak_memory_estimate_bytes"] > 2**20


def test_transformers_switches_turn_bars_and_lines_off(shown):
    _, text = shown("mobilequant", bars=False, steps=2)
    assert "this run takes" in text and "it/s" not in text and "\r" not in text
    _, text = shown("mobilequant", bars=False, verbosity=standard.ERROR, steps=2)
    assert text == ""


def test_the_environment_turns_bars_off(monkeypatch):
    script = "from optimum_mobilequant.log import progress_bar\nfor _ in progress_bar(range(3), 'stage'): pass"
    for value, there in (("0", True), ("1", False)):
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
        done = tiny.run_python(script)
        assert done.returncode == 0 and ("stage" in done.stderr) is there


def test_no_module_makes_a_bar_of_its_own():
    """Else a switch would not reach it."""
    own = {path.name for path in (tiny.ROOT / "optimum_mobilequant").rglob("*.py") if "tqdm(" in path.read_text()}
    assert own == {"log.py"}
    assert list(progress_bar([1, 2], "x", show=False)) == [1, 2]
    assert get_logger("optimum_mobilequant.x").name == f"{ROOT}.x"


def work(recipe="best", effort="default", finished=(), **options):
    settings = tiny.config("w4a8", recipe=recipe, effort=effort, steps=None, **options).resolve()
    return remaining_work(tiny.plan_of(tiny.build("llama")), replace(settings, prefix="auto"), 8, finished)


def test_the_estimate_counts_what_is_left():
    assert work("rtn") < work("mobilequant") < work("best")
    # In passes over sequences: those of effort best are twice as long.
    assert work(effort="light") < work(effort="default") < 2 * work(effort="best")
    assert work("mobilequant", finished=["calibrate"]) < work("mobilequant")
    twice = work("mobilequant", samples=16) - work("mobilequant", samples=8)
    assert twice == pytest.approx(2 * 8 * 2 + 16)  # two calibrations and the look for a prefix, of 8 sequences more
    stages = ["prefix", "calibrate", "transform", "learn", "round", "pack"]
    assert work(finished=stages) == 0
    assert [in_words(m) for m in (0.2, 1.2, 7.4, 95)] == [
        "less than a minute",
        "about 1 minute",
        "about 7 minutes",
        "about 2 hours",
    ]


def test_a_pass_is_timed_and_memory_that_is_held_is_counted():
    model = tiny.build("llama")
    assert 0 < seconds_of_a_pass(model, tiny.probe_ids()[:1]) < 5
    assert 0 < held_memory("cpu", model) <= peak_memory("cpu")


def test_a_resumed_run_expects_less(tmp_path):
    def estimate(folder):
        options = tiny.config("w4a8", recipe="mobilequant", steps=4)
        model = quantize(tiny.build("llama-gqa"), None, options, run_dir=str(folder))
        return model.config.quantization_config.recorded["minutes_estimate"]

    assert estimate(tmp_path) > 0
    assert estimate(tmp_path) == 0  # all stages are there


def test_the_table_at_the_end_says_what_came_out():
    recorded = {
        "validation_perplexity": {"float": 10.0, "start": 12.0, "quantized": 10.5},
        "loss": {"start": 0.5, "best": 0.25},
        "best_step": 4,
        "rounding": {"start": 0.25, "best": 0.125},
        "finetune": None,
        "minutes": 3.0,
        "minutes_estimate": 2.5,
        "peak_memory_bytes": 2**31,
    }
    table = summary(recorded, 1_000_000, 1_000_000, "out")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in table.splitlines())
    assert rows == {
        "perplexity, float": "10.0000",
        "before learning": "12.0000 (+20.00%)",
        "quantized": "10.5000 (+5.00%)",
        "loss of learning": "0.5 -> 0.25",
        "loss of rounding": "0.25 -> 0.125",
        "size": "1.0 MB, 50% of 2.0 MB in bfloat16",
        "minutes": "3.00 (estimated before: 2.50)",
        "peak memory, GiB": "2.00",
        "saved": "out",
    }
    assert "loss" not in summary({"loss": {"start": 1.0, "best": 1.0}, "best_step": 0}, 1, 1, "out")


def test_stages_are_those_of_the_recipes():
    assert set(STAGES) <= set(recipes.RECIPES)
