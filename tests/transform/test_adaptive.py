"""Adaptive smoothing: which channels it scales, what its threshold minimises, and that the function stays."""

import pytest
import torch

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.transform import adaptive, adaptive_scales, edges_of
from optimum_mobilequant.tune import Learnables, build_student, refuse_different
from tests.tiny import build, config, logits_of, plan_of, token_ids

SITES = ("norm_qkv", "norm_mlp", "up_down", "v_o")
IDS = torch.tensor(token_ids(16))


def setup(variant="llama-gqa", preset="w4a8", sites=SITES):
    model = build(variant)
    plan = plan_of(model, preset)
    edges = edges_of(plan.family, plan.geometry, sites)
    student = build_student(model, plan)
    return model, plan, edges, student, adaptive_scales(edges, student, plan, IDS, batch_size=8)


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma", "qwen3", "stablelm"])
@torch.no_grad()
def test_the_float_function_stays(variant):
    model, plan, edges, student, scales = setup(variant)
    Learnables(student, plan, edges, scales)
    refuse_different(student, model, IDS[:2])
    assert max(float(s.max()) for s in scales.values()) > 0.1


def test_only_channels_beyond_one_threshold_are_scaled():
    _, _, edges, _, scales = setup()
    assert scales.keys() == {edge.name for edge in edges}
    scaled = [s for s in scales.values() if float(s.max()) > 0]
    assert scaled and all((s >= 0).all() for s in scales.values())
    # channels at or below the threshold stay exactly as they are
    assert any(0 < int((s == 0).sum()) < len(s) for s in scaled)


def test_the_largest_threshold_scales_nothing(monkeypatch):
    monkeypatch.setattr(adaptive, "_SHARES", [1.0])
    _, _, _, _, scales = setup()
    assert all(not s.any() for s in scales.values())


def test_the_smallest_error_wins(monkeypatch):
    """Each threshold alone, judged by the same search: none is better than the one chosen out of all."""
    errors = {}
    search = adaptive._search

    def watched(edge, site, inputs, options):
        output = adaptive._OUTPUTS[edge.site]
        measured = []
        monkeypatch.setitem(
            adaptive._OUTPUTS, edge.site, lambda s, x, o: measured.append(output(s, x, o)) or measured[-1]
        )
        chosen = search(edge, site, inputs, options)
        monkeypatch.setitem(adaptive._OUTPUTS, edge.site, output)
        exact, rest = measured[: len(inputs)], measured[len(inputs) :]
        per_share = [rest[i : i + len(inputs)] for i in range(0, len(rest), len(inputs))]
        errors[edge.name] = [
            sum(float((y - e).double().square().sum()) for y, e in zip(part, exact, strict=True)) for part in per_share
        ]
        best = errors[edge.name].index(min(errors[edge.name]))
        top = torch.stack([x.flatten(0, -2).abs().amax(0) for x in inputs]).amax()
        assert float(chosen.max()) == pytest.approx(-torch.tensor(adaptive._SHARES[best]).log().item(), abs=1e-4), top
        return chosen

    monkeypatch.setattr(adaptive, "_search", watched)
    setup()
    assert len(errors) == 8
    assert all(len(part) == len(adaptive._SHARES) and part[0] > min(part) * 0.999 for part in errors.values())
    assert sum(min(part) < part[0] * 0.95 for part in errors.values()) >= 2  # scaling helps somewhere


def test_a_site_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="no rule for"):
        setup(sites=("q_k",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "qqq", "transforms": ["q_k"]}, "leave q_k out of transforms"),
        ({"recipe": "qqq", "smooth_alpha": 0.5}, 'smoothing is "adaptive"'),
        ({"recipe": "rtn", "smoothing": "adaptive"}, "has no transform to act on"),
        ({"recipe": "qqq", "smoothing": "adaptiv"}, 'did you mean "adaptive"'),
        ({"recipe": "qqq", "smoothing": "balance"}, "smooth_alpha"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MobileQuantConfig("w4a8", **options)


def test_the_recipe_runs_and_its_parts_can_be_mixed():
    data = {"dataset": token_ids(64), "samples": 48, "batch_size": 16}
    model = quantize(build("llama-gqa"), None, config("w4a8", recipe="qqq", effort="none", steps=None, **data))
    record = model.config.quantization_config.recorded["rounding"]
    assert record["best"] < record["start"]
    settings = MobileQuantConfig("w4a8", recipe="mobilequant", smoothing="adaptive", transforms=list(SITES)).resolve()
    assert settings.smooth_alpha is None and settings.learn_transforms
    assert torch.isfinite(logits_of(model)).all()
