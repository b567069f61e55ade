"""Turned signs of channels: the float model computes the same bits, the ranges of activations get smaller."""

import copy

import pytest
import torch

from optimum_mobilequant import pipeline, quantize
from optimum_mobilequant.calibrate import collect
from optimum_mobilequant.config.recipes import RECIPES, SIGN_SITES, SITES
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.transform.signs import fitted_absmax, quarter_turns_of, signs_of, turn
from optimum_mobilequant.tune import build_student
from tests.folding import decode, prefill, relative_error
from tests.tiny import FAMILIES, VARIANTS, build, config, logits_of, plan_of, probe_ids, token_ids


def turned(variant):
    """A model, the same with signs turned, its student, and the turns."""
    model = build(variant)
    plan, changed = plan_of(model), copy.deepcopy(model)
    student = build_student(changed, plan)
    statistics = collect(student, torch.tensor(token_ids(8)), batch_size=4)
    turns, fitted = signs_of(statistics, plan, None)
    turn(changed, turns, student)
    return model, changed, student, turns, statistics, fitted


@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_float_model_computes_the_same_bits(variant, run):
    model, changed, student, turns, *_ = turned(variant)
    assert any((entry.sign < 0).any() for entry in turns), "nothing was turned"
    assert torch.equal(run(changed, probe_ids()), run(model, probe_ids()))
    set_mode(student, Mode.OFF)
    assert relative_error(run(student, probe_ids()), run(model, probe_ids())) <= 2e-5


@pytest.mark.parametrize("variant", FAMILIES)
def test_turning_back_restores_every_bit(variant):
    model, changed, _, turns, *_ = turned(variant)
    names = {name for name, value in model.state_dict().items() if not torch.equal(changed.state_dict()[name], value)}
    assert {name.split(".")[-2] for name in names} >= {"up_proj", "down_proj", "v_proj", "o_proj"}
    assert any("norm" in name for name in names) == (variant != "gemma"), "a gain of 1 + w is not turned exactly"
    turn(changed, turns, back=True)
    assert all(torch.equal(changed.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("left_out", ["up_proj", "down_proj", "v_proj", "o_proj", "input_layernorm"])
def test_a_side_left_out_is_seen(left_out):
    model, changed, _, turns, *_ = turned("llama-gqa")
    turn(changed, [entry for entry in turns if entry.module.endswith(left_out)])
    assert relative_error(prefill(changed, probe_ids()), prefill(model, probe_ids())) > 1e-2


@pytest.mark.parametrize("variant", FAMILIES)
def test_longer_tails_are_on_one_side(variant):
    _, _, student, _, before, fitted = turned(variant)
    after = collect(student, torch.tensor(token_ids(8)), batch_size=4)
    seen = 0
    for name, (low, high) in after.channel_ends.items():
        if name.endswith("down_proj.input") or (name.endswith("layernorm.output") and variant != "gemma"):
            assert (high >= -low - 1e-5).all(), name
            assert torch.allclose(torch.maximum(high, -low), before.channel_absmax[name], rtol=1e-4, atol=1e-5)
            assert (fitted.channel_absmax[name] >= before.channel_absmax[name] * (1 - 1e-5)).all()
            seen += 1
    assert seen == (2 if variant == "gemma" else 6)


def quartered(variant):
    """A model, the same with quarter turns, its student, the turns, and statistics before and after."""
    model = build(variant)
    plan, changed = plan_of(model), copy.deepcopy(model)
    student = build_student(changed, plan)
    before = collect(student, torch.tensor(token_ids(8)), batch_size=4)
    turns, after = quarter_turns_of(before, plan)
    turn(changed, turns, student)
    return model, changed, student, turns, before, after


@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quarter_turns_of_pairs_change_nothing(variant, run):
    model, changed, student, turns, *_ = quartered(variant)
    assert bool(turns) == (variant != "qwen3"), "a gain between projection and rotation is common to all heads"
    assert relative_error(run(changed, probe_ids()), run(model, probe_ids())) <= 1e-5
    set_mode(student, Mode.OFF)
    assert relative_error(run(student, probe_ids()), run(model, probe_ids())) <= 2e-5
    turn(changed, turns, back=True)
    assert all(torch.equal(changed.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("left_out", ["q_proj", "k_proj"])
def test_a_quarter_turn_of_one_side_alone_is_seen(left_out):
    model, changed, _, turns, *_ = quartered("llama-gqa")
    turn(changed, [entry for entry in turns if entry.module.endswith(left_out)], back=True)
    assert relative_error(prefill(changed, probe_ids()), prefill(model, probe_ids())) > 1e-2


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa", "stablelm", "qwen2"])
def test_quarter_turns_bring_queries_above_zero(variant):
    _, _, student, _, before, expected = quartered(variant)
    after = collect(student, torch.tensor(token_ids(8)), batch_size=4)
    plan = plan_of(build(variant))
    g = plan.geometry
    half = g.rotary_dims // 2
    better = 0
    for name in (n for n in after.channel_ends if n.endswith("_rotated")):
        assert torch.allclose(after.channel_ends[name], expected.channel_ends[name], rtol=1e-4, atol=1e-4)
        assert torch.allclose(after.channel_absmax[name], expected.channel_absmax[name], rtol=1e-4, atol=1e-4)
        if name.endswith("query_rotated"):
            was, now = (
                s.channel_ends[name][0].view(g.kv_heads, g.groups, g.head_dim)[..., : 2 * half]
                .reshape(g.kv_heads, g.groups, 2, half).amin((1, 2))
                for s in (before, after)
            )  # fmt: skip
            assert (now >= was - 1e-4).all(), "no pair reaches further below zero"
            better += int((now > was + 1e-3).sum())
    assert better > 0


def test_scales_level_what_leaves_the_range_first():
    longer = torch.tensor([1.0, 2.0, 4.0, 0.0])
    assert torch.equal(fitted_absmax(longer, longer), longer)  # symmetric: the range is, too
    one_sided = fitted_absmax(longer, 0.1 * longer)
    assert torch.equal(one_sided, longer)
    mixed = fitted_absmax(torch.ones(8), torch.tensor([0.3] * 7 + [0.9]))
    share = 0.9 / mixed[-1]
    assert torch.equal(mixed[:7], torch.ones(7)) and 0.3 <= share < 0.9
    grid = [((1 + s) ** 2) * (7 + max(1.0, 0.9 / s) ** 2) / 8 for s in torch.linspace(0.3, 1, 500).tolist()]
    found = (1 + share) ** 2 * (7 + float(mixed[-1]) ** 2) / 8
    assert found <= min(grid) * 1.001 and found < 4
    assert torch.equal(fitted_absmax(torch.zeros(3), torch.zeros(3)), torch.zeros(3))


def test_it_makes_the_range_of_one_sided_channels_smaller():
    """Half of the channels of the product reach far below zero, the others far above it."""
    model = build("llama-gqa")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.up_proj.weight * torch.tensor([4.0, -4.0]).repeat(24)[:, None])
    zeros = {}
    for sites in (SITES, (*SITES, *SIGN_SITES)):
        options = {"recipe": "smoothquant-edge", "smooth_alpha": 1.0, "effort": "none", "steps": None}
        result = quantize(copy.deepcopy(model), None, config("w8a8", transforms=sites, **options))
        inputs = [layer.mlp.down_proj.input for layer in result.model.layers]
        zeros[len(sites)] = [int(q.zero_point) for q in inputs]
    for middle, low in zip(zeros[5], zeros[6], strict=True):
        assert 100 < middle < 155 and low < 60, "one end of the range has gone"


def test_a_prefix_follows(monkeypatch):
    """Behind a prefix, with everything off but the transforms, the model still is the float model."""
    kept = {}

    def look(student, job):
        set_mode(student, Mode.OFF)
        kept["student"] = prefill(student, probe_ids())
        set_mode(student, Mode.QUANTIZE)
        return original(student, job)

    original = pipeline.fold_and_round
    monkeypatch.setattr(pipeline, "fold_and_round", look)
    for sites in (SITES, (*SITES, *SIGN_SITES)):
        quantize(
            build("llama-gqa"), None, config("w8a8", recipe="mobilequant", steps=1, transforms=sites, prefix=[5, 6])
        )
        kept[len(sites)] = kept.pop("student")
    assert relative_error(kept[6], kept[5]) <= 1e-4


def test_a_run_that_fails_gives_the_model_back_as_it_came(monkeypatch):
    model = build("llama-gqa")
    held = model.state_dict()
    before = {name: value.clone() for name, value in held.items()}

    def fail(student, job):
        assert not torch.equal(job.model.model.layers[0].mlp.up_proj.weight, before[name])
        raise OSError("disk full")

    name = "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(pipeline, "fold_and_round", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize(model, None, config("w8a8", recipe="best", rounding_steps=2))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(torch.equal(held[key], value) for key, value in before.items()), "tensors that others hold stay"


def test_an_error_halfway_turns_back_what_was_turned(monkeypatch):
    from optimum_mobilequant.transform import stage

    model, done = build("llama-gqa"), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*args):
        if len(done) == 5:
            raise MemoryError
        done.append(args)
        turn(*args)

    monkeypatch.setattr(stage, "turn", fail)
    with pytest.raises(MemoryError):
        quantize(model, None, config("w8a8", recipe="best", rounding_steps=2))
    assert len(done) == 5 and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_resumed_run_turns_the_same_signs(tmp_path, monkeypatch):
    options = {"recipe": "best", "rounding_steps": 2, "steps": 2}
    expected = logits_of(quantize(build("llama-gqa"), None, config("w8a8", **options)))
    original = pipeline.fold_and_round
    monkeypatch.setattr(pipeline, "fold_and_round", lambda student, job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(build("llama-gqa"), None, config("w8a8", **options), run_dir=str(tmp_path))
    monkeypatch.setattr(pipeline, "fold_and_round", original)
    again = quantize(build("llama-gqa"), None, config("w8a8", **options), run_dir=str(tmp_path))
    assert torch.equal(logits_of(again), expected)


def test_which_recipes_have_it():
    assert {name for name, recipe in RECIPES.items() if "signs" in recipe.transforms} == {"best", "qad"}
