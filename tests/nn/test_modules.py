"""Quantizer modes, and that the student computes what is packed."""

import copy

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.calibrate import choose_ranges, collect
from optimum_mobilequant.checkpoint import install, pack
from optimum_mobilequant.nn import Mode, Quantizer, quantizers_of, set_mode
from optimum_mobilequant.numerics import affine_qparams, fake_quantize
from optimum_mobilequant.plan import ActivationSpec
from optimum_mobilequant.tune import Learnables, build_student
from tests.folding import relative_error
from tests.tiny import VARIANTS, build, config, logits_of, plan_of, token_ids


def calibrated(model, plan):
    """A student with min/max ranges and nothing else."""
    student = build_student(model, plan)
    statistics = collect(student, torch.tensor(token_ids(8)), batch_size=4)
    learnables = Learnables(student, plan, [], {})
    learnables.set_ranges(student, choose_ranges(plan, statistics, "minmax"), learn=True)
    return student, learnables, statistics


@pytest.mark.parametrize("preset", ["w8a8", "w4a8-asym", "w8a8-paper"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_installed_integers_compute_what_the_student_computes(variant, preset):
    model = build(variant)
    plan = plan_of(model, preset)
    student, learnables, _ = calibrated(model, plan)
    learnables.release(student)
    packed = pack(student, plan)
    for (
        path,
        bias,
    ) in packed.biases.items():  # the student does not round its biases; all else must be equal bit for bit
        object.__setattr__(student.get_submodule(path).bias, "source", bias)
    expected = logits_of(student)
    install(model, plan, packed)
    assert torch.equal(logits_of(model), expected)


def test_biases_lie_on_the_grid_of_the_accumulator():
    model = build("qwen2")
    floats = {n: b.clone() for n, b in model.named_parameters() if n.endswith("bias")}
    quantized = quantize(model, None, config())
    for i in range(2):
        scale_in = quantized.model.layers[i].input_layernorm.output.scale
        for part in "qkv":
            name = f"model.layers.{i}.self_attn.{part}_proj"
            linear = quantized.get_submodule(name)
            step = scale_in.double() * linear.weight.scale.double().squeeze(1)
            codes = linear.bias.double() / step
            assert torch.allclose(codes, codes.round(), atol=1e-3)
            assert bool(((linear.bias - floats[f"{name}.bias"]).abs() <= step * 0.501).all())


def test_biases_of_layer_norms_lie_on_a_grid_far_finer_than_the_output():
    model = build("stablelm")
    floats = {n: b.clone() for n, b in model.named_parameters() if n.endswith("norm.bias")}
    quantized = quantize(model, None, config())
    assert len(floats) == 5
    for name, bias in floats.items():
        norm = quantized.get_submodule(name.removesuffix(".bias"))
        step = norm.output.scale.double() * 2.0**-15
        codes = norm.bias.double() / step
        assert codes.abs().max() < 2**31
        # float32 holds 24 of the 32 bits
        assert torch.allclose(codes, codes.round(), rtol=1e-7, atol=1e-3)
        assert torch.allclose(norm.bias, bias, rtol=1e-6, atol=float(step))


def test_modes():
    spec = ActivationSpec("x", "up", 8)
    quantizer, x = Quantizer(spec), torch.tensor([-0.3, 0.0, 0.26])
    assert quantizer.scale.isnan()
    quantizer.set(torch.tensor(0.1), torch.tensor(128))
    rounded = torch.tensor([-0.3, 0.0, 0.3])
    assert torch.allclose(quantizer(x), rounded)
    quantizer.mode = Mode.OFF
    assert quantizer(x) is x
    quantizer.mode = Mode.OBSERVE
    assert quantizer(x) is x
    quantizer.mode = Mode.LEARN
    assert torch.allclose(quantizer(x), rounded)
    quantizer.learned = (torch.tensor(0.2, requires_grad=True), torch.tensor(128.0))
    with torch.enable_grad():
        out = quantizer(x)
    assert torch.allclose(out, torch.tensor([-0.4, 0.0, 0.2]))
    out.sum().backward()
    assert quantizer.learned[0].grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-bias", "gemma", "stablelm"])
def test_casting_a_model_keeps_everything_that_is_stored(variant, dtype):
    model = quantize(build(variant), None, config("w8a8-paper"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(dtype)
    assert model.dtype == dtype
    assert logits_of(model).dtype == dtype
    for key, tensor in model.state_dict().items():
        if "dtype_anchor" not in key:
            assert tensor.dtype == before[key].dtype, key
            assert torch.equal(tensor, before[key]), key


def test_low_precision_computes_nearly_the_same():
    model = quantize(build("llama-gqa"), None, config())
    reference = logits_of(model)
    low = logits_of(copy.deepcopy(model).to(torch.bfloat16)).float()
    assert (low - reference).norm() < 0.25 * reference.norm()


def test_observing_changes_no_output_and_sees_every_activation():
    model = build("qwen3")
    plan = plan_of(model)
    student, _, statistics = calibrated(model, plan)
    set_mode(student, Mode.OFF)
    assert relative_error(logits_of(student), logits_of(model)) <= 2e-6
    assert statistics.low.keys() == statistics.high.keys() == plan.activations.keys()
    assert all(q.observer is None and q.mode is Mode.OFF for q in quantizers_of(student))
    # calibration ends on the ranges of the float model: spot check of one activation
    seen = []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    logits_of(model, torch.tensor(token_ids(8)))
    hook.remove()
    name = "model.layers.1.mlp.up_proj.output"
    assert torch.allclose(statistics.low[name], seen[0].min().clamp(max=0), rtol=1e-5)
    assert torch.allclose(statistics.high[name], seen[0].max().clamp(min=0), rtol=1e-5)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "lp"])
def test_ranges_hold_zero_and_never_exceed_the_extremes(method):
    model = build("llama")
    plan = plan_of(model)
    _, _, statistics = calibrated(model, plan)
    ranges = choose_ranges(plan, statistics, method)
    assert ranges.keys() == {n for n, s in plan.activations.items() if s.fixed is None}
    for name, (low, high) in ranges.items():
        assert low <= 0 <= high, name
        spec = plan.activations[name]
        if spec.role != "scores":
            assert low >= statistics.low[name], name
            assert high <= statistics.high[name], name
        if spec.bits == 16 and spec.role != "scores":
            assert (low, high) == (statistics.low[name].clamp(max=0), statistics.high[name].clamp(min=0))


def test_range_search_lowers_the_error_of_a_heavy_tail():
    model = build("llama")
    name, spec = "model.layers.0.mlp.up_proj", ActivationSpec("x", "up", 8)
    with torch.no_grad():
        model.get_submodule(name).weight[0, :2] *= 30.0  # one channel far outside the others
    plan = plan_of(model)
    statistics = calibrated(model, plan)[2]
    seen = []
    model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    logits_of(model, torch.tensor(token_ids(8)))

    def error(method):
        scale, zero_point = affine_qparams(*choose_ranges(plan, statistics, method)[f"{name}.output"], spec.grid)
        return float((fake_quantize(seen[0], scale, zero_point, spec.grid) - seen[0]).square().mean())

    assert error("mse") <= error("minmax") * 1.001
    assert error("mse") <= error("percentile") * 1.001
    assert error("lp") <= error("minmax") * 1.001


def test_lp_search_finds_the_least_error_of_its_norm():
    """Against a dense grid over both ends, on values whose tails differ; a higher norm clips less."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50_000, generator=generator)
    values = torch.where(values > 0, values**1.5, values * 0.3)
    name, spec = "model.layers.0.mlp.up_proj.output", ActivationSpec("x", "up", 8)
    model = build("llama")
    plan = plan_of(model)
    statistics = calibrated(model, plan)[2]
    statistics.sample[name] = torch.stack([values, torch.ones_like(values)])
    statistics.low[name], statistics.high[name] = values.min(), values.max()

    def error(low, high, norm):
        scale, zero_point = affine_qparams(low, high, spec.grid)
        return float((fake_quantize(values, scale, zero_point, spec.grid) - values).abs().pow(norm).sum())

    spans = {}
    for norm in (2.0, 2.4, 4.0):
        found = choose_ranges(plan, statistics, "lp", norm=norm)[name]
        grid = [torch.linspace(0.1, 1.0, 40) * end for end in (values.min(), values.max())]
        least = min(error(low, high, norm) for low in grid[0] for high in grid[1])
        assert error(*found, norm) <= 1.1 * least
        spans[norm] = float(found[1] - found[0])
    assert 1.02 * spans[2.0] < spans[2.4] < spans[4.0], spans


def test_unknown_range_method_is_refused():
    model = build("llama")
    plan = plan_of(model)
    with pytest.raises(ValueError, match='range_init "max" is unknown; known: minmax, percentile, mse, lp'):
        choose_ranges(plan, calibrated(model, plan)[2], "max")
