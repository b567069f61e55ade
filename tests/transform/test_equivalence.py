"""Transforms do not change the float function: every site alone and all together, for every family."""

import copy

import pytest
import torch

from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.nn.tunable import TunableBias, TunableWeight
from optimum_mobilequant.transform import SITES, edges_of
from optimum_mobilequant.tune import Learnables, build_student
from tests.folding import Float64, decode, divergence, fold, prefill, random_scales, relative_error
from tests.tiny import VARIANTS, build, plan_of, probe_ids

EACH_AND_ALL = [*((site,) for site in SITES), SITES]
RUNS = {"prefill": prefill, "decode": decode}
sites_of = pytest.mark.parametrize("sites", EACH_AND_ALL, ids=[*SITES, "all"])
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return build(request.param)


def edges_for(model, sites):
    plan = plan_of(model)
    return edges_of(plan.family, plan.geometry, sites)


@sites_of
@runs
def test_exact_in_float64(model, sites, run):
    exact = copy.deepcopy(model).double()
    edges = edges_for(model, sites)
    with Float64():
        reference = run(exact, probe_ids())
        changed = run(fold(exact, edges, random_scales(edges)), probe_ids())
    assert reference.dtype == torch.float64
    assert relative_error(changed, reference) <= 1e-9


@sites_of
@runs
def test_exact_within_rounding_in_float32(model, sites, run):
    edges = edges_for(model, sites)
    reference = run(model, probe_ids())
    changed = run(fold(model, edges, random_scales(edges)), probe_ids())
    assert relative_error(changed, reference) <= 1e-4
    assert divergence(changed, reference) <= 1e-7


@pytest.fixture(scope="module")
def transformed(model):
    """Student with all sites attached, quantizers off, and the same transforms folded into a plain model."""
    plan, edges = plan_of(model), edges_for(model, SITES)
    scales = random_scales(edges)
    student = build_student(model, plan)
    learnables = Learnables(student, plan, edges, scales)
    set_mode(student, Mode.OFF)
    return student, learnables, fold(copy.deepcopy(model).double(), edges, scales)


@runs
def test_student_without_rounding_equals_the_folded_model(model, transformed, run):
    student, _, folded = transformed
    assert relative_error(run(student, probe_ids()), run(copy.deepcopy(folded).float(), probe_ids())) <= 2e-5
    assert relative_error(run(student, probe_ids()), run(model, probe_ids())) <= 1e-4


def test_student_folds_into_the_same_weights(model, transformed):
    student, _, folded = transformed
    offset = 1.0 if model.config.model_type == "gemma" else 0.0
    seen = 0
    for name, module in student.named_modules():
        for part in ("weight", "bias"):
            provider = getattr(module, part, None)
            if not isinstance(provider, TunableWeight | TunableBias):
                continue
            expected = getattr(folded.get_submodule(name), part).double()
            expected = expected + offset if part == "weight" and expected.ndim == 1 else expected
            assert torch.allclose(provider.folded().double(), expected, rtol=1e-7, atol=1e-9), f"{name}.{part}"
            seen += 1
    assert seen >= len(plan_of(model).weights) - model.config.tie_word_embeddings


def test_building_a_student_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reference = prefill(model, probe_ids())
    student = build_student(model, plan_of(model))
    set_mode(student, Mode.OFF)
    assert relative_error(prefill(student, probe_ids()), reference) <= 2e-6
    assert torch.equal(prefill(model, probe_ids()), reference)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    pointers = {p.data_ptr() for p in model.parameters()}
    sources = {m.source.data_ptr() for m in student.modules() if isinstance(m, TunableWeight | TunableBias)}
    assert sources <= pointers, "the student copied weights"
