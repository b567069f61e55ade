"""Matrices that look like equivalent transforms and are not: the equivalence test must see each of them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from optimum_mobilequant.transform import MatrixEdge, MatrixEffect, edges_of, matrix_edges_of
from tests.folding import Float64, exact, fold, multiply, prefill, random_matrices, random_scales, relative_error
from tests.tiny import build, plan_of, probe_ids


def error_of(model, edges, matrices=None, before=lambda m: m):
    doubled = copy.deepcopy(model).double()
    with Float64():
        reference = prefill(doubled, probe_ids())
        changed = multiply(before(doubled), edges, exact(random_matrices(edges)) if matrices is None else matrices)
        return relative_error(prefill(changed, probe_ids()), reference)


def edges_for(model, sites=(), rotate=None):
    plan = plan_of(model)
    return matrix_edges_of(plan.family, plan.geometry, sites, rotate)


def test_every_effect_and_fold_is_needed():
    """Dropping any one tensor from a true edge breaks it."""
    model = build("llama-bias")
    for edges in (edges_for(model, ["v_o_dense"]), edges_for(model, ["q_k_rotation"]), edges_for(model, rotate="r1")):
        edge = edges[0]
        for left_out in range(len(edge.effects)):
            module = model.get_submodule(edge.effects[left_out].module)
            if module.weight.ndim == 1:
                continue  # an RMSNorm has no bias to turn
            effects = tuple(e for i, e in enumerate(edge.effects) if i != left_out)
            assert error_of(model, [replace(edge, effects=effects)]) > 1e-3
        for left_out in range(len(edge.folds)):
            folds = tuple(f for i, f in enumerate(edge.folds) if i != left_out)
            assert error_of(model, [replace(edge, folds=folds)]) > 1e-3


def test_a_layernorms_bias_is_needed():
    model = build("stablelm")
    (edge, *_) = edges_for(model, rotate="r1")
    effects = tuple(e for e in edge.effects if not e.module.endswith("norm"))
    assert len(effects) < len(edge.effects)
    assert error_of(model, [replace(edge, effects=effects)]) > 1e-3


def test_layernorm_needs_the_mean_kept():
    model = build("stablelm")
    (edge,) = edges_for(model, rotate="r1")
    assert edge.keeps_mean
    assert error_of(model, [edge]) <= 1e-9
    free = replace(edge, keeps_mean=False)
    assert error_of(model, [free], exact(random_matrices([free]))) > 1e-3


def test_rms_norms_need_no_kept_mean():
    (edge,) = edges_for(build("llama"), rotate="r1")
    assert not edge.keeps_mean


def test_residual_matrix_must_be_orthogonal():
    """Any invertible matrix would cancel between writers and readers; the norm's statistics give it away."""
    model = build("llama")
    (edge,) = edges_for(model, rotate="r1")
    dense = {"r1": exact(random_matrices([edge]))["r1"] * (torch.rand(32, 1, dtype=torch.float64) + 0.5)}
    assert error_of(model, [edge], dense) > 1e-3


def test_scales_of_a_norm_belong_behind_the_rotation():
    """Scales in the float model's basis are folded away with the gain; left in the norm they are not diagonal."""
    model = build("llama-gqa")
    plan = plan_of(model)
    edges, scales = edges_for(model, rotate="r1"), edges_of(plan.family, plan.geometry, ["norm_qkv"])
    assert error_of(model, edges, before=lambda m: fold(m, scales, random_scales(scales))) <= 1e-9
    unfolded = [replace(edges[0], folds=())]
    assert error_of(model, unfolded, before=lambda m: fold(m, scales, random_scales(scales))) > 1e-3


def test_tied_embeddings_cannot_stay_tied():
    model = build("llama-tied")
    edges = edges_for(model, rotate="r1")
    doubled = copy.deepcopy(model).double()
    with Float64():
        reference = prefill(doubled, probe_ids())
        changed = multiply(doubled, edges, exact(random_matrices(edges)))
        assert relative_error(prefill(changed, probe_ids()), reference) <= 1e-9
        changed.lm_head.weight = changed.model.embed_tokens.weight
        assert relative_error(prefill(changed, probe_ids()), reference) > 1e-3


class PostNorm(nn.Module):
    """What Gemma-2 puts behind its projections: a norm with a gain of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        torch.manual_seed(1)
        self.gain = nn.Parameter(torch.rand(inner.out_features) + 0.5)

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        y = self.inner(x)
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.gain


def test_residual_rotation_does_not_pass_a_post_norm():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = PostNorm(layer.self_attn.o_proj)
    edges = edges_for(build("llama"), rotate="r1")
    assert error_of(model, edges) > 1e-3
    with torch.no_grad():  # a constant gain would pass
        for layer in model.model.layers:
            layer.self_attn.o_proj.gain.fill_(0.7)
    assert error_of(model, edges) <= 1e-9


def per_layer(model, kind, start, effects, **more):
    plan = plan_of(model)
    return [
        MatrixEdge(
            f"layer{i}", "control", kind, start(plan.geometry), tuple(effects(plan.family, plan.geometry, i)), **more
        )
        for i in range(plan.geometry.layers)
    ]


def heads(g):
    return torch.eye(g.head_dim, dtype=torch.float64).repeat(g.kv_heads, 1, 1)


def kv_head(g):
    return torch.arange(g.heads) // g.groups


@pytest.mark.parametrize("variant", ["llama", "llama-gqa", "stablelm"])
def test_queries_and_keys_take_no_other_rotation(variant):
    """An orthogonal matrix that is not a turn of rotary pairs does not commute with the rotary embedding."""
    model = build(variant)

    def effects(f, g, i):
        return [MatrixEffect(f.layer(i, f.query), "rows", kv_head(g)), MatrixEffect(f.layer(i, f.key), "rows")]

    assert error_of(model, per_layer(model, "orthogonal", heads, effects)) > 1e-3
    rotary = plan_of(model).geometry.rotary_dims
    assert error_of(model, per_layer(model, "plane", heads, effects, rotary_dims=rotary)) <= 1e-9


def test_turns_of_the_wrong_pairs_are_noticed():
    """Partial rotary: pairs are half of the rotating dims apart, not half of the head."""
    model = build("stablelm")

    def effects(f, g, i):
        return [MatrixEffect(f.layer(i, f.query), "rows", kv_head(g)), MatrixEffect(f.layer(i, f.key), "rows")]

    assert error_of(model, per_layer(model, "plane", heads, effects, rotary_dims=16)) > 1e-3


def test_query_and_key_turn_alike():
    model = build("llama")

    def effects(f, g, i):
        return [MatrixEffect(f.layer(i, f.query), "rows", kv_head(g))]

    rotary = plan_of(model).geometry.rotary_dims
    assert error_of(model, per_layer(model, "plane", heads, effects, rotary_dims=rotary)) > 1e-3


def test_turns_before_a_query_norm_are_noticed():
    """RMS statistics survive the turn, the gain behind them does not."""
    model = build("qwen3")

    def effects(f, g, i):
        return [MatrixEffect(f.layer(i, f.query), "rows", kv_head(g)), MatrixEffect(f.layer(i, f.key), "rows")]

    assert error_of(model, per_layer(model, "plane", heads, effects, rotary_dims=16)) > 1e-3


def test_values_share_their_matrix_with_the_group():
    model = build("llama-gqa")

    def effects(f, g, i):
        other = kv_head(g).flip(0)
        return [MatrixEffect(f.layer(i, f.value), "rows"), MatrixEffect(f.layer(i, f.out), "columns", other)]

    assert error_of(model, per_layer(model, "dense", heads, effects)) > 1e-3


def test_gate_takes_no_matrix():
    model = build("llama")

    def effects(f, g, i):
        return [MatrixEffect(f.layer(i, f.gate), "rows"), MatrixEffect(f.layer(i, f.down), "columns")]

    def start(g):
        return torch.eye(g.mlp, dtype=torch.float64)[None]

    assert error_of(model, per_layer(model, "dense", start, effects)) > 1e-3
