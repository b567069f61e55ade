"""Sensitivities against their definitions, and what must not change them."""

import pytest
import torch

from optimum_mobilequant.allocate.budget import units_of
from optimum_mobilequant.allocate.sensitivity import MEASURES, layer_importance
from optimum_mobilequant.nn.tunable import TunableWeight
from optimum_mobilequant.numerics import dequantize
from tests.tiny import FAMILIES, build, plan_of, probe_ids

CHOICES = (3, 4, 8)


def measured(name, model, ids=None, seed=0):
    plan, measure = plan_of(model), MEASURES[name]
    units = units_of(model, plan, CHOICES, by_layer=measure.by_layer)
    return measure.make(model, plan, units, CHOICES, seed)(probe_ids() if ids is None else ids, 0), units


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_bits_cost_more_everywhere(name, family):
    model = build(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses, units = measured(name, model)
    assert losses.shape == (len(units), len(CHOICES)) and losses.dtype == torch.float64
    assert (losses[:, 0] > losses[:, 1]).all() and (losses[:, 1] > losses[:, 2]).all()
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(losses, measured(name, model)[0])


def test_importance_is_the_distance_of_the_likeliest_tokens():
    model = build("llama-gqa")
    ids, plan = probe_ids(), plan_of(model)
    states = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    found = layer_importance(model, plan, ids, top_k=5)
    kept = states[: len(model.model.layers) + 1]  # the projections below run the final norm's hook again
    with torch.no_grad():
        tops = [model.lm_head(model.model.norm(state)).topk(5).indices.flatten(0, 1).tolist() for state in kept]
    for i, value in enumerate(found.tolist()):
        distances = [1 - len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(tops[i], tops[i + 1], strict=True)]
        assert value == pytest.approx(sum(distances) / len(distances), abs=1e-12)


def test_a_layer_that_passes_its_input_on_has_no_importance():
    model = build("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    importance = layer_importance(model, plan_of(model), probe_ids())
    assert importance[1] == 0 and importance[0] > 0 and importance[2] > 0


def test_importance_does_not_see_an_equivalent_transform():
    model = build("llama").double()
    ids, before = probe_ids(), None
    for _ in range(2):
        found = layer_importance(model, plan_of(model), ids)
        assert before is None or torch.allclose(found, before, atol=1e-9)
        before = found
        with torch.no_grad():
            scale = torch.rand(48, dtype=torch.float64) + 0.5
            model.model.layers[0].mlp.up_proj.weight.div_(scale[:, None])
            model.model.layers[0].mlp.down_proj.weight.mul_(scale)


def test_kl_is_that_of_a_model_with_this_projection_rounded():
    model, changed = build("llama"), build("llama")
    losses, units = measured("kl", model)
    spec = plan_of(model, overrides={"*": {"weight_bits": 3}}).weights[units[9].name]
    weight, ids = changed.get_submodule(units[9].name).weight, probe_ids()
    with torch.no_grad():
        weight.copy_(dequantize(*TunableWeight(weight.clone(), spec).codes()))
        p, q = (m(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (model, changed))
    kl = (p.exp() * (p - q)).sum(-1).mean() * len(ids)
    assert losses[9, 0].item() == pytest.approx(kl.item(), rel=1e-3)


def test_hessian_estimates_the_kl_of_a_small_change():
    """At 8 bits the second order is all there is: the mean over many label draws approaches the divergence."""
    model = build("llama", num_hidden_layers=1)
    plan, ids = plan_of(model), probe_ids(batch=16)
    units = units_of(model, plan, [8], by_layer=False)
    estimate = sum(MEASURES["hessian"].make(model, plan, units, [8], seed)(ids, 0) for seed in range(8))[:, 0] / 8
    found = []
    for unit in units:
        changed = build("llama", num_hidden_layers=1)
        weight = changed.get_submodule(unit.name).weight
        with torch.no_grad():
            weight.copy_(dequantize(*TunableWeight(weight.clone(), plan.weights[unit.name]).codes()))
            p, q = (m.double()(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (model, changed))
        found.append((p.exp() * (p - q)).sum(-1).mean().item() * len(ids))
        model.float()
    ratio = estimate / torch.tensor(found, dtype=torch.float64)
    assert ((ratio > 0.4) & (ratio < 2.5)).all(), ratio  # the diagonal alone: cross terms are left out
    assert abs(ratio.log().mean()) < 0.35, ratio


def test_another_seed_draws_other_labels():
    model = build("llama")
    assert not torch.equal(measured("hessian", model)[0], measured("hessian", model, seed=1)[0])
