import copy

import pytest
import torch

from benchmarks.outliers import inject_outliers
from optimum_mobilequant import quantize
from tests import tiny


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_float_function_stays(variant):
    model = tiny.build(variant)
    before = tiny.logits_of(model)
    weights = copy.deepcopy(model.state_dict())
    chosen = inject_outliers(model, seed=1)
    after = tiny.logits_of(model)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()

    assert len(chosen) == 3 * model.config.num_hidden_layers
    assert all(len(set(channels)) == len(channels) >= 2 for channels in chosen.values())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    layer = "model.layers.0."
    expected = {"input_layernorm", "post_attention_layernorm", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"}
    expected |= {f"self_attn.{part}_proj" for part in "qkv"}
    assert {name.removeprefix(layer).rpartition(".")[0] for name in changed if name.startswith(layer)} == expected


@pytest.mark.parametrize("variant", ["llama-gqa", "stablelm", "gemma"])
def test_the_chosen_channels_grow_by_the_factor(variant):
    model = tiny.build(variant)
    seen = {}

    def watch(name):
        model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.__setitem__(name, out.detach()))

    for name in ("model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj"):
        watch(name)
    tiny.logits_of(model)
    before = dict(seen)
    chosen = inject_outliers(model, factor=30.0)
    tiny.logits_of(model)
    for name, edge in (("input_layernorm", "norm_qkv"), ("mlp.up_proj", "up_down")):
        grown = torch.ones(before[f"model.layers.0.{name}"].shape[-1])
        grown[chosen[f"model.layers.0.{edge}"]] = 30.0
        expected = before[f"model.layers.0.{name}"] * grown
        torch.testing.assert_close(seen[f"model.layers.0.{name}"], expected, rtol=1e-4, atol=1e-4)


def error_of_rtn(injected):
    model = tiny.build("llama-gqa")
    if injected:
        inject_outliers(model)
    target = tiny.logits_of(model)
    return (tiny.logits_of(quantize(model, None, tiny.config("w8a8"))) - target).square().mean() / target.var()


def test_rounding_to_nearest_degrades():
    assert error_of_rtn(injected=True) > 10 * error_of_rtn(injected=False)


def test_the_choice_depends_on_the_seed_alone():
    first, again, other = (inject_outliers(tiny.build("llama"), seed=seed) for seed in (3, 3, 4))
    assert first == again != other
