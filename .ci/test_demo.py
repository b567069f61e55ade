"""Checks the result that ``make demo`` left in ``demo-out/demo.json``."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

RESULT = Path(__file__).resolve().parent.parent / "demo-out" / "demo.json"
NUMBERS = ("perplexity", "gap", "bytes", "minutes")


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    assert RESULT.is_file(), f"{RESULT} is missing: run `make demo` first"
    return json.loads(RESULT.read_text(encoding="utf-8"))


def row(demo: dict[str, Any], recipe: str, preset: str | None = None) -> dict[str, Any]:
    found = [r for r in demo["rows"] if r["recipe"] == recipe and preset in (None, r["preset"])]
    assert len(found) == 1, f"{len(found)} rows for {recipe} {preset or ''}, expected one"
    return found[0]


def test_every_number_is_finite(demo):
    assert demo["rows"]
    for values in demo["rows"]:
        assert values["model"], values
        for key in NUMBERS:
            assert math.isfinite(values[key]), (key, values)


def test_w8a8_is_close_to_float(demo):
    assert row(demo, "mobilequant", "w8a8")["gap"] <= 0.01


def test_w4a8_beats_rounding_to_nearest(demo):
    assert row(demo, "mobilequant", "w4a8")["gap"] < 0.6 * row(demo, "rtn", "w4a8")["gap"]


def test_w4a8_is_small(demo):
    assert row(demo, "mobilequant", "w4a8")["bytes"] < 0.35 * row(demo, "float")["bytes"]


def test_the_model_writes(demo):
    assert isinstance(demo["sample"], str)
    assert demo["sample"].strip()


def test_reload_is_bitwise_equal(demo):
    assert demo["reload_bitwise"] is True


def test_minutes_were_estimated_before(demo):
    for preset in ("w8a8", "w4a8"):
        learned = row(demo, "mobilequant", preset)
        assert 1 / 5 < learned["minutes_estimate"] / learned["minutes"] < 5, learned


def test_the_report_is_one_page_with_the_ladder_and_every_plot(demo):
    page = (RESULT.parent / "report.html").read_text(encoding="utf-8")
    assert 100_000 < len(page) < 3_000_000
    for heading in ("Result", "Ladder", "Learning", "Worst sites", "Distribution", "Learned parameters"):
        assert f">{heading}</h2>" in page, heading
    assert page.count("<svg") >= 12
    for found in demo["rows"]:
        assert f"{found['perplexity']:.4f}" in page, found


def test_the_demo_takes_minutes(demo):
    assert 0 < demo["seconds"] <= 1500  # no measurement of speed: 260 s on a fast pair of cores, 540 s on a slow one
