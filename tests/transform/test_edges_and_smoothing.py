"""The data of the edges, and the closed form of their start values."""

import copy
import math

import pytest
import torch

from optimum_mobilequant.calibrate import collect
from optimum_mobilequant.transform import SITES, edges_of, smooth_scales
from optimum_mobilequant.transform.edges import rotary_pairs
from optimum_mobilequant.tune import build_student
from tests.tiny import VARIANTS, build, plan_of, token_ids


@pytest.mark.parametrize(
    ("head_dim", "rotary_dims", "expected"),
    [
        (8, 8, [0, 1, 2, 3, 0, 1, 2, 3]),
        (8, 4, [0, 1, 0, 1, 2, 3, 4, 5]),
        (4, 0, [0, 1, 2, 3]),
    ],
)
def test_dims_that_rotate_together_share_a_scale(head_dim, rotary_dims, expected):
    assert rotary_pairs(head_dim, rotary_dims).tolist() == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_edges_cover_every_layer_and_fit_their_tensors(variant):
    model = build(variant)
    plan = plan_of(model)
    edges = edges_of(plan.family, plan.geometry, SITES)
    assert len(edges) == len({e.name for e in edges}) == plan.geometry.layers * len(SITES)
    for edge in edges:
        used = torch.zeros(edge.size, dtype=torch.bool)
        for effect in edge.effects:
            weight = model.get_submodule(effect.module).weight
            length = weight.shape[1] if effect.dim == "columns" else weight.shape[0]
            index = torch.arange(edge.size) if effect.index is None else effect.index
            assert len(index) == length
            used[index] = True
        assert used.all(), f"{edge.name} has scales that act on nothing"
        assert {e.sign for e in edge.effects} == {-1, 1}
        for name in edge.trade or (edge.activation,):
            assert name in plan.activations
        assert (edge.trade is None) == (edge.site != "q_k")


def test_only_the_chosen_sites_in_a_fixed_order():
    plan = plan_of(build("llama"))
    edges = edges_of(plan.family, plan.geometry, ["v_o", "norm_qkv"])
    assert [e.site for e in edges] == ["norm_qkv", "v_o"] * 2
    assert edges_of(plan.family, plan.geometry, []) == []
    with pytest.raises(ValueError, match=r"unknown transform sites \['gate_down'\]; known: norm_qkv"):
        edges_of(plan.family, plan.geometry, ["gate_down"])


def largest_of_shared(x, heads, g, over_all_heads):
    """Channels ``[heads * head_dim]`` to one value for each q/k scale: maximum over rotary pairs, then over heads."""
    x = x.view(heads, g.head_dim)
    rotating, rest = x[:, : g.rotary_dims], x[:, g.rotary_dims :]
    x = torch.cat([rotating.view(heads, 2, g.rotary_dims // 2).amax(1), rest], 1)
    return x.amax(0) if over_all_heads else x.view(g.kv_heads, heads // g.kv_heads, -1).amax(1).flatten()


def inner_rows(scales, layer, part, f, g):
    """Factor on each row of q, k, v or up from the edges up_down, v_o and q_k (1 where q/k norms take it)."""
    if part == f.up:
        return 1 / scales[f"{layer}.up_down"]
    if part == f.value:
        return 1 / scales[f"{layer}.v_o"]
    if f.query_norm is not None:
        return torch.ones((g.heads if part == f.query else g.kv_heads) * g.head_dim)
    (edge,) = (e for e in edges_of(f, g, ["q_k"]) if e.name == f"{layer}.q_k")
    effect = next(e for e in edge.effects if e.module == f"{layer}.{part}")
    return scales[edge.name][effect.index] ** effect.sign


@pytest.fixture(scope="module", params=["llama-gqa", "gemma", "qwen3", "stablelm"])
def observed(request):
    model = build(request.param)
    plan = plan_of(model)
    statistics = collect(build_student(model, plan), torch.tensor(token_ids(8)), batch_size=4)
    return model, plan, statistics.channel_absmax


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_start_values_are_the_closed_form(observed, alpha):
    model, plan, absmax = observed
    f, g = plan.family, plan.geometry
    logs = smooth_scales(edges_of(f, g, SITES), model, absmax, alpha)
    for i in range(g.layers):
        q, k, v, o, gate, up, down = (
            model.get_submodule(f.layer(i, part)).weight.detach().abs()
            for part in (f.query, f.key, f.value, f.out, f.gate, f.up, f.down)
        )
        # What the norms' readers look like once the edges inside the layer have scaled their rows.
        inner = {name: log.exp() for name, log in logs.items() if name.startswith(f"{f.layer(i)}.")}
        q, k, v, up = (
            weight * (inner_rows(inner, f.layer(i), part, f, g))[:, None]
            for weight, part in ((q, f.query), (k, f.key), (v, f.value), (up, f.up))
        )
        x_qkv, x_mlp = (absmax[f"{f.layer(i, norm)}.output"] for norm in (f.input_norm, f.mlp_norm))
        expected = {
            "norm_qkv": (x_qkv, torch.cat([q, k, v]).amax(0)),
            "norm_mlp": (x_mlp, torch.cat([gate, up]).amax(0)),
            "up_down": (absmax[f"{f.layer(i, f.down)}.input"], down.amax(0)),
            "v_o": tuple(
                t.view(g.kv_heads, g.groups, g.head_dim).amax(1).flatten()
                for t in (absmax[f"{f.layer(i, f.attention)}.context"], o.amax(0))
            ),
        }
        for site, (x, w) in expected.items():
            scale = x.double() ** alpha / w.double() ** (1 - alpha)
            assert torch.allclose(logs[f"{f.layer(i)}.{site}"].double().exp(), scale, rtol=1e-5), site
        query, key = (
            largest_of_shared(absmax[f"{f.layer(i, f.attention)}.{name}"], heads, g, f.query_norm is not None).double()
            for name, heads in (("query_rotated", g.heads), ("key_rotated", g.kv_heads))
        )
        scale = query ** (1 - alpha) / key**alpha
        assert torch.allclose(logs[f"{f.layer(i)}.q_k"].double().exp(), scale, rtol=1e-5)


def test_channels_are_observed_where_their_readers_see_them(observed):
    """Each recorded magnitude equals the one of the float model's own tensor, channel by channel."""
    model, plan, absmax = observed
    f, seen = plan.family, {}
    for i in range(plan.geometry.layers):
        for part in (f.out, f.down, f.query, f.gate):
            name = f.layer(i, part)
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, args, name=name: seen.update({name: args[0].abs().flatten(0, -2).amax(0)})
            )
    model(input_ids=torch.tensor(token_ids(8)))
    for i in range(plan.geometry.layers):
        for part, source in (
            (f.out, f"{f.layer(i, f.attention)}.context"),
            (f.down, f"{f.layer(i, f.down)}.input"),
            (f.query, f"{f.layer(i, f.input_norm)}.output"),
            (f.gate, f"{f.layer(i, f.mlp_norm)}.output"),
        ):
            assert torch.allclose(absmax[source], seen[f.layer(i, part)], rtol=1e-4, atol=1e-5), source


def test_channels_that_never_fire_are_left_alone(observed):
    model, plan, absmax = observed
    edges = edges_of(plan.family, plan.geometry, ["norm_mlp", "up_down"])
    dead = {name: x.clone() for name, x in absmax.items()}
    for edge in edges:
        dead[edge.activation][3] = 0.0
    logs = smooth_scales(edges, model, dead, 0.5)
    untouched = smooth_scales(edges, model, absmax, 0.5)
    others = torch.arange(plan.geometry.hidden) != 3
    for edge in edges:
        assert logs[edge.name][3] == 0.0
        assert torch.isfinite(logs[edge.name]).all()
        if edge.site == "up_down":  # the norm's edge looks at the rows of up, which this one has changed
            n = min(len(others), edge.size)
            assert torch.equal(logs[edge.name][:n][others[:n]], untouched[edge.name][:n][others[:n]])


def test_an_equivalent_rescaling_of_the_model_does_not_matter(observed):
    """Large rows of up, levelled by their own edge, leave the norm's scales as they were."""
    model, plan, absmax = observed
    f, g = plan.family, plan.geometry
    expected = smooth_scales(edges_of(f, g, SITES), model, absmax, 0.7)
    changed, seen = copy.deepcopy(model), {name: x.clone() for name, x in absmax.items()}
    with torch.no_grad():
        for i in range(g.layers):
            changed.get_submodule(f.layer(i, f.up)).weight[:3] *= 30.0
            changed.get_submodule(f.layer(i, f.down)).weight[:, :3] /= 30.0
            seen[f"{f.layer(i, f.down)}.input"][:3] *= 30.0
    logs = smooth_scales(edges_of(f, g, SITES), changed, seen, 0.7)
    for name, log in logs.items():
        shift = torch.zeros_like(log)
        if name.endswith("up_down"):
            shift[:3] = math.log(30.0)
        assert torch.allclose(log, expected[name] + shift, atol=1e-5), name


def test_columns_without_weights_are_left_alone():
    model = build("llama-gqa")
    plan = plan_of(model)
    down = plan.family.layer(0, plan.family.down)
    with torch.no_grad():
        model.get_submodule(down).weight[:, 5] = 0.0
    (edge, *_) = edges_of(plan.family, plan.geometry, ["up_down"])
    logs = smooth_scales([edge], model, {edge.activation: torch.ones(edge.size)}, 0.5)[edge.name]
    assert logs[5] == 0.0
    assert torch.isfinite(logs).all()
