"""Massive tokens are found, and a prefix takes them out of the text."""

import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.calibrate import find_outliers, find_prefix
from optimum_mobilequant.calibrate.prefix import most_tokens
from optimum_mobilequant.run.prepare import nll
from optimum_mobilequant.transform import edges_of, smooth_scales
from tests.prefix.fixture import massive, texts
from tests.tiny import build, config, plan_of

IDS = torch.tensor(texts())


def mass(model=None, **options):
    model = massive() if model is None else model
    return find_prefix(model, plan_of(model), IDS, options.pop("choice", "auto"), batch_size=16)


def test_massive_first_tokens_are_found_and_a_prefix_removes_them():
    model = massive()
    plan = plan_of(model)
    plain = find_outliers(model, plan, IDS)
    assert plain.first > 0.95 and plain.per_text < 1.1 and plain.ratio > 64
    behind = find_outliers(model, plan, IDS, prefix=[1])
    assert behind.per_text < 0.5 * plain.per_text


def test_a_plain_model_has_none():
    model = build("llama-gqa")
    assert find_outliers(model, plan_of(model), IDS).per_text == 0
    assert mass(model).tokens == ()
    assert mass(model, choice=True).tokens != ()  # asked for, it is there
    assert mass(model, choice=False).report == {}


def test_few_tokens_are_enough():
    found = mass()
    assert 1 <= len(found.tokens) <= 2
    before, after = found.report["outliers_per_text"]
    assert after <= 0.1 * before
    assert mass(choice=[1, 2]).tokens == (1, 2)
    assert len(mass(choice=1).tokens) == 1


def test_a_prefix_that_does_not_help_is_not_taken(monkeypatch):
    from optimum_mobilequant.calibrate import prefix as module

    monkeypatch.setattr(module, "_search", lambda *a: [])
    assert mass().tokens == ()


def test_most_tokens():
    assert [most_tokens(c) for c in (False, True, "auto", 2, [5, 6, 7])] == [0, 4, 4, 2, 3]


def test_static_ranges_collapse_and_the_prefix_repairs_them():
    """Nats per token above the float model, on all texts."""
    start = nll(massive(), IDS, 16)
    for preset in ("w8a8", "w8a8-full"):
        lost = {}
        for prefix in (False, "auto"):
            model = quantize(massive(), None, config(preset, dataset=texts(), prefix=prefix))
            lost[prefix] = nll(model, IDS, 16) - start
        assert lost[False] > 0.2 and lost["auto"] < 0.25 * lost[False], (preset, lost)
    settings = model.config.quantization_config
    assert settings.recorded["prefix"]["tokens"] == settings.prefix
    assert set(settings.recorded["validation_perplexity"]) == {"float", "float_prefix", "start", "quantized"}


def test_ranges_exclude_the_prefix():
    """The range of what the down projection reads shrinks by more than the outlier threshold's share."""
    ends = []
    for prefix in (False, "auto"):
        model = quantize(massive(), None, config("w8a8", dataset=texts(), prefix=prefix))
        ends.append(float(model.model.layers[0].mlp.down_proj.input.scale))
    assert ends[1] < ends[0] / 20


def test_the_float_model_is_the_one_that_is_measured():
    model = massive()
    assert nll(model, IDS, 8, [1]) != nll(model, IDS, 8)


def test_a_unit_that_fires_at_the_prefix_alone_is_not_brought_to_the_level_of_the_others():
    model = build("llama-gqa")
    plan = plan_of(model)
    (edge,) = [e for e in edges_of(plan.family, plan.geometry, ("up_down",)) if e.name.startswith("model.layers.0.")]
    magnitude = torch.ones(edge.size)
    magnitude[3] = 1e-5
    levelled = smooth_scales([edge], model, {edge.activation: magnitude}, 0.7)[edge.name]
    kept = smooth_scales([edge], model, {edge.activation: magnitude}, 0.7, silent=0.01)[edge.name]
    assert levelled[3] < -5 and kept[3] == 0
    others = torch.arange(edge.size) != 3
    assert torch.equal(levelled[others], kept[others])
