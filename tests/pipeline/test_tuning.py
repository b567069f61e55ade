"""Learning does what it is for, moves what it is told to move, and what it measured is what is packed."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from optimum_mobilequant import pipeline, quantize
from optimum_mobilequant.config import recipes
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.transform import edges_of
from optimum_mobilequant.transform import stage as transform_stage
from optimum_mobilequant.tune import parameters
from optimum_mobilequant.tune.loop import batch_index
from optimum_mobilequant.tune.objective import kl_top_k
from tests.folding import divergence, fold, random_scales
from tests.tiny import FAMILIES, build, config, logits_of, plan_of, token_ids

FAST = {"lr_transforms": 5e-3, "lr_clips": 2e-2, "lr_ranges": 5e-3}
LONGER = {"dataset": token_ids(160), "samples": 64, "batch_size": 16, "steps": 40}
GROUPS = ("transforms", "clips", "ranges")


@pytest.fixture(autouse=True)
def _frequent_validation(monkeypatch):
    monkeypatch.setitem(recipes.EFFORTS, "light", replace(recipes.EFFORTS["light"], eval_every=10))


def recorded(model):
    return model.config.quantization_config.recorded


def tuned(model, preset="w8a8", **options):
    return quantize(model, None, config(preset, recipe="mobilequant", **options))


def only(group, rate):
    return {f"learn_{name}": name == group for name in GROUPS} | {f"lr_{group}": rate}


def gain_of(model):
    """Validation loss after learning, relative to its start."""
    loss = recorded(model)["loss"]
    assert loss["best"] == min(value for _, value in recorded(model)["history"])
    return loss["best"] / loss["start"]


@pytest.fixture
def learnables(monkeypatch):
    """The learned parameters of the runs of a test: values before and after learning, and the student."""
    seen = []
    learn = pipeline.learn

    def spy(model, student, parameters, job):
        before = {k: v.detach().clone() for k, v in parameters.state_dict().items()}
        result = learn(model, student, parameters, job)
        seen.append((before, {k: v.detach().clone() for k, v in parameters.state_dict().items()}, student))
        return result

    monkeypatch.setattr(pipeline, "learn", spy)
    return seen


def group_of(key):
    return {"scales": "transforms", "matrices": "matrices", "clips": "clips", "ranges": "ranges"}[key.split(".")[0]]


def moved(before, after):
    return {group_of(k) for k in before if before[k].numel() and not torch.equal(before[k], after[k])}


# -- each group, started far from where it should be ------------------------------------------------------------------


@pytest.fixture
def wide_ranges(monkeypatch):
    choose = transform_stage.choose_ranges

    def three_times(*args, **options):
        return {name: (3 * low, 3 * high) for name, (low, high) in choose(*args, **options).items()}

    monkeypatch.setattr(transform_stage, "choose_ranges", three_times)


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma"])
def test_learned_ranges_repair_ranges_that_are_too_wide(variant, wide_ranges, learnables):
    assert gain_of(tuned(build(variant), **LONGER, **only("ranges", 0.1))) < 0.4
    ((before, after, _),) = learnables
    assert moved(before, after) == {"ranges"}
    assert after["ranges"].mean() < -0.1  # logarithms of the change: the ranges shrank


@pytest.fixture
def unbalanced(monkeypatch):
    """Makes models whose channels are rescaled at random, which leaves their function alone; no start values help."""
    monkeypatch.setattr(
        transform_stage, "smooth_scales", lambda edges, *a, **k: {e.name: torch.zeros(e.size) for e in edges}
    )

    def make(variant, sites):
        model = build(variant)
        plan = plan_of(model)
        edges = edges_of(plan.family, plan.geometry, sites)
        return fold(model, edges, random_scales(edges, 1.5))

    return make


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma"])
@pytest.mark.parametrize("sites", [["up_down", "v_o"], ["norm_qkv", "norm_mlp"], ["q_k"]], ids="+".join)
def test_learned_transforms_repair_unbalanced_channels(variant, sites, learnables, unbalanced):
    model = tuned(unbalanced(variant, sites), **LONGER, transforms=sites, **only("transforms", 0.1))
    assert gain_of(model) < 0.6
    ((before, after, _),) = learnables
    assert moved(before, after) == {"transforms"}


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma"])
def test_learned_clips_open_ranges_that_cut_too_much(variant, learnables, monkeypatch):
    monkeypatch.setattr(parameters, "DEFAULT_CLIP_LOGIT", -1.0)  # a share of 0.27 of each range
    assert gain_of(tuned(build(variant), "w4a16", **LONGER, clip_init="none", **only("clips", 0.1))) < 0.75
    ((before, after, _),) = learnables
    assert moved(before, after) == {"clips"}


@pytest.mark.parametrize("variant", FAMILIES)
def test_all_groups_learn_together(variant, wide_ranges, learnables):
    model = tuned(build(variant), **LONGER, lr_transforms=5e-3, lr_clips=2e-2, lr_ranges=0.1)
    assert recorded(model)["loss"]["objective"] == "logits_kl"
    assert gain_of(model) < 0.6
    ((before, after, _),) = learnables
    assert moved(before, after) == set(GROUPS)


def test_packed_model_has_the_gain_that_was_measured(wide_ranges):
    teacher = build("llama-gqa")
    ids = torch.tensor(token_ids(16, seed=5))  # seen by nobody
    reference = logits_of(teacher, ids)
    learned = tuned(copy.deepcopy(teacher), **LONGER, lr_ranges=0.1)
    plain = quantize(copy.deepcopy(teacher), None, config())
    assert divergence(logits_of(learned, ids), reference) < 0.4 * divergence(logits_of(plain, ids), reference)


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["rtn", "smoothquant", "smoothquant-edge", "mobilequant"])
def test_without_steps_nothing_is_learned(recipe, learnables):
    steps = {"steps": 0} if recipe == "mobilequant" else {"effort": "none", "steps": None}
    quantize(build("llama-gqa"), None, config("w8a8", recipe=recipe, **steps))
    ((before, after, _),) = learnables
    assert moved(before, after) == set()


@pytest.mark.parametrize("recipe", ["omniquant-static", "omniquant-edge"])
def test_block_wise_recipes_learn_layer_by_layer(recipe, learnables, unbalanced):
    model = unbalanced("qwen3", ["norm_qkv", "norm_mlp", "v_o"])
    model = quantize(model, None, config("w8a8", recipe=recipe, lr_transforms=0.1, **LONGER))
    loss = recorded(model)["loss"]
    assert loss["objective"] == "hidden_mse"
    assert loss["best"] < 0.7 * loss["start"]
    ((before, after, _),) = learnables
    assert moved(before, after) == {"transforms", "clips"}
    sites = {key.rpartition("/")[2] for key in before if key.startswith("scales")}
    assert ("up_down" in sites) == (recipe == "omniquant-edge")
    for site in sites:  # in every layer
        assert all(not torch.equal(before[k], after[k]) for k in before if k.endswith(f"/{site}"))


@pytest.mark.parametrize("variant", ["llama-gqa", "gemma", "stablelm"])
def test_student_learns_on_the_values_that_are_packed(variant, learnables):
    model = build(variant)
    teacher = copy.deepcopy(model)
    quantize(model, None, config("w4a8", recipe="mobilequant", steps=6, **FAST))
    ((_, _, student),) = learnables
    ids = torch.tensor(token_ids(8))
    reference, packed = logits_of(teacher, ids), logits_of(model, ids)
    rounded = logits_of(student, ids)
    # Up to codes that rounding in float32 instead of float64 moved, and biases on their int32 grid.
    assert divergence(packed, rounded) < 0.05 * divergence(packed, reference)
    set_mode(student, Mode.OFF)
    assert divergence(logits_of(student, ids), reference) < 1e-6


def test_gradients_reach_every_parameter(learnables, monkeypatch):
    seen = {}
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        for group in self.param_groups:
            seen.setdefault(group["name"], []).extend(bool(p.grad.abs().sum() > 0) for p in group["params"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    quantize(build("llama-gqa"), None, config("w4a8", recipe="mobilequant", steps=1))
    assert seen.keys() == set(GROUPS)
    assert all(all(flags) for flags in seen.values())


def test_float_weights_are_freed():
    model = build("llama-gqa")
    names = ("lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.norm")
    alive = [weakref.ref(model.get_submodule(name).weight) for name in names]
    model = quantize(model, None, config(recipe="mobilequant", steps=2))
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(names)


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [96, 500])
def test_divergence_over_the_whole_vocabulary(top_k):
    student, teacher = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    expected = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="none")
    assert torch.allclose(kl_top_k(student, teacher, top_k), expected.sum(-1).mean(), rtol=1e-5)


def test_divergence_over_the_top_tokens():
    student, teacher = torch.randn(3, 7, 96) * 2, torch.randn(3, 7, 96) * 2
    full, parts = kl_top_k(student, teacher, 96), [kl_top_k(student, teacher, k) for k in (1, 8, 32)]
    assert 0 < parts[0] < parts[1] < parts[2] < full  # merging tokens into a bucket loses information
    assert kl_top_k(teacher, teacher, 8).abs() < 1e-5
    moved_tail = teacher.clone()
    moved_tail[..., teacher.argmin(-1)[0, 0]] += 20.0  # mass outside the top tokens is not free
    assert kl_top_k(moved_tail, teacher, 8) > 1.0


def test_batches_are_passes_over_the_data():
    count, size = 10, 4
    rows = torch.cat([batch_index(count, size, step, seed=3) for step in range(5)])
    for epoch in rows.split(count):
        assert sorted(epoch.tolist()) == list(range(count))
    assert not torch.equal(*rows.split(count))
    assert torch.equal(batch_index(count, size, 7, 3), batch_index(count, size, 7, 3))
    assert not torch.equal(batch_index(count, count, 0, 3), batch_index(count, count, 0, 4))
    assert sorted(batch_index(3, 8, 0, 0).tolist()) == [0, 1, 2]  # never the same row twice in a batch
