"""Rescalings that look like equivalent transforms and are not: the equivalence test must see each of them."""

import copy

import pytest
import torch

from optimum_mobilequant.transform import Edge, Effect, edges_of
from tests.folding import Float64, fold, prefill, random_scales, relative_error
from tests.tiny import build, plan_of, probe_ids


def error_of(model, edges):
    exact = copy.deepcopy(model).double()
    with Float64():
        reference = prefill(exact, probe_ids())
        return relative_error(prefill(fold(exact, edges, random_scales(edges)), probe_ids()), reference)


def per_layer(model, make):
    """One edge a layer: ``make(family, geometry, layer)`` gives (size, effects)."""
    plan = plan_of(model)
    edges = []
    for i in range(plan.geometry.layers):
        size, effects = make(plan.family, plan.geometry, i)
        edges.append(Edge(f"layer{i}", "control", size, tuple(effects), None))
    return edges


def gate_to_down(f, g, i):
    return g.mlp, [Effect(f.layer(i, f.gate), "rows", -1), Effect(f.layer(i, f.down), "columns", 1)]


def untied_rotary_pairs(f, g, i):
    dims = torch.arange(g.head_dim)
    kv_head = torch.arange(g.heads) // g.groups
    query = (kv_head[:, None] * g.head_dim + dims).reshape(-1)
    return g.kv_heads * g.head_dim, [
        Effect(f.layer(i, f.query), "rows", -1, query),
        Effect(f.layer(i, f.key), "rows", 1),
    ]


def untied_norm_gains(f, g, i):
    attention = f.layer(i, f.attention)
    return g.head_dim, [Effect(f"{attention}.q_norm", "rows", -1), Effect(f"{attention}.k_norm", "rows", 1)]


def rows_before_a_query_norm(f, g, i):
    """With q/k norms the projections' own rows are no transform: the norm takes the scale out again."""
    dims = torch.arange(g.head_dim) % (g.head_dim // 2)
    return g.head_dim // 2, [
        Effect(f.layer(i, f.query), "rows", -1, dims.repeat(g.heads)),
        Effect(f.layer(i, f.key), "rows", 1, dims.repeat(g.kv_heads)),
    ]


def output_not_shared_by_group(f, g, i):
    first_of_group = (torch.arange(g.kv_heads)[:, None] * g.groups * g.head_dim + torch.arange(g.head_dim)).reshape(-1)
    return g.heads * g.head_dim, [
        Effect(f.layer(i, f.value), "rows", -1, first_of_group),
        Effect(f.layer(i, f.out), "columns", 1),
    ]


def norm_without_consumers(f, g, i):
    return g.hidden, [Effect(f.layer(i, f.input_norm), "rows", -1)]


def norm_with_one_consumer_missing(f, g, i):
    return g.hidden, [
        Effect(f.layer(i, f.mlp_norm), "rows", -1),
        Effect(f.layer(i, f.gate), "columns", 1),
    ]


@pytest.mark.parametrize(
    ("variant", "make"),
    [
        ("llama-gqa", gate_to_down),
        ("gemma", gate_to_down),
        ("llama", untied_rotary_pairs),
        ("llama-gqa", untied_rotary_pairs),
        ("stablelm", untied_rotary_pairs),
        ("qwen3", untied_norm_gains),
        ("qwen3", rows_before_a_query_norm),
        ("llama-gqa", output_not_shared_by_group),
        ("gemma", output_not_shared_by_group),
        ("llama", norm_without_consumers),
        ("stablelm", norm_without_consumers),
        ("gemma", norm_with_one_consumer_missing),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_rescaling_is_noticed(variant, make):
    model = build(variant)
    assert error_of(model, per_layer(model, make)) > 1e-3


@pytest.mark.parametrize("variant", ["llama", "stablelm"])
def test_residual_channels_cannot_be_rescaled(variant):
    """Every writer multiplied, every reader divided: only the statistics inside the norms give it away."""
    model = build(variant)
    f, g = (plan := plan_of(model)).family, plan.geometry
    effects = [Effect(f.embedding, "columns", 1), Effect(f.final_norm, "rows", -1)]
    for i in range(g.layers):
        effects += [Effect(f.layer(i, part), "rows", 1) for part in (f.out, f.down)]
        effects += [Effect(f.layer(i, part), "rows", -1) for part in (f.input_norm, f.mlp_norm)]
    assert error_of(model, [Edge("residual", "control", g.hidden, tuple(effects), None)]) > 1e-3


@pytest.mark.parametrize("site", ["norm_qkv", "norm_mlp", "up_down", "v_o", "q_k"])
def test_each_effect_of_a_real_edge_is_needed(site):
    """Dropping any one tensor from a true edge breaks it."""
    model = build("llama-gqa")
    plan = plan_of(model)
    (edge, *_) = edges_of(plan.family, plan.geometry, [site])
    for left_out in range(len(edge.effects)):
        kept = tuple(e for i, e in enumerate(edge.effects) if i != left_out)
        assert error_of(model, [Edge(edge.name, site, edge.size, kept, edge.activation)]) > 1e-3


def test_forgetting_the_bias_is_noticed():
    model = build("llama-bias")
    plan = plan_of(model)
    edges = edges_of(plan.family, plan.geometry, ["up_down", "v_o", "q_k"])
    assert error_of(model, edges) <= 1e-9
    for part in ("v_proj", "q_proj", "up_proj"):
        changed = fold(copy.deepcopy(model).double(), edges, random_scales(edges))
        for name, module in changed.named_modules():
            if name.endswith(part):
                module.bias.data.copy_(model.get_submodule(name).bias)
        with Float64():
            reference = prefill(copy.deepcopy(model).double(), probe_ids())
            assert relative_error(prefill(changed, probe_ids()), reference) > 1e-3
