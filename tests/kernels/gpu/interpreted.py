"""Tests that need Triton's interpreter; ``test_interpreter.py`` runs them in a process of their own.

The interpreter rounds float32 to bfloat16 towards zero, a GPU to nearest: bfloat16 results are compared with float32
ones cut off the same way.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_mobilequant import quantize, set_backend
from optimum_mobilequant.kernels import Output, prepare
from optimum_mobilequant.kernels.gpu import autotune, configs, layout, linear, real_linear
from optimum_mobilequant.kernels.gpu.configs import Config
from optimum_mobilequant.kernels.gpu.workspace import workspace_of
from optimum_mobilequant.kernels.weight_only import DECODES, prepare_weight_only
from optimum_mobilequant.nn import QuantLinear
from optimum_mobilequant.runtime import served
from tests.kernels.layers import OUTPUTS, make
from tests.tiny import build, config, logits_of

# Columns: fewer than a block, one more than a block, several parts of a split. Rows: decode, several tiles, prefill.
SHAPES = [(1, 1, 1), (5, 70, 129), (17, 65, 1100), (33, 7, 128), (70, 130, 200)]
CPU = torch.device("cpu")


def cut_off(x):
    """float32 as the interpreter's bfloat16."""
    return (x.view(torch.int32) >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def expected_of(layer, output):
    if output.dtype != torch.bfloat16:
        return layer.prepare(output, "reference")(layer.x)
    wide = Output(torch.float32, output.qmax, output.zero_point, output.scale)
    return cut_off(layer.prepare(wide, "reference")(layer.x))


def all_configs():
    """Each once: the interpreter knows neither warps nor stages."""
    rows = [(kind, row) for kinds in configs.TABLE.values() for kind, found in kinds.items() for row in found]
    found = {(kind, replace(row.config, warps=1, stages=1)) for kind, row in rows}
    return sorted(found, key=repr)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(linear, "architecture_of", lambda device: "sm90")
    monkeypatch.setattr(autotune, "architecture_of", lambda device: "sm90")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_totals_are_exact(bits, symmetric):
    for shape in SHAPES:
        layer = make(*shape, bits=bits, symmetric=symmetric)
        assert torch.equal(layer.prepare(Output.totals(), "triton")(layer.x).long(), layer.totals()), shape


@pytest.mark.parametrize("bits", [8, 4])
def test_totals_of_activations_whose_top_bits_were_flipped_before(bits, hopper):
    layer = make(80, 130, 140, bits=bits, symmetric=False)
    assert torch.equal(layer.prepare(Output.totals(), "triton")(layer.x).long(), layer.totals())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_those_of_the_reference(bits, kind):
    for shape in ((5, 70, 129), (17, 35, 1100), (70, 20, 64)):
        layer, output = make(*shape, bits=bits, symmetric=bits == 8), OUTPUTS[kind]
        found = layer.prepare(output, "triton")(layer.x)
        assert found.dtype == output.dtype and torch.equal(found, expected_of(layer, output)), shape


@pytest.mark.parametrize(("kind", "config"), all_configs())
def test_every_configuration_of_the_table(kind, config):
    if kind.startswith("w4a8") or kind == "w8a8":
        layer = make(19, 150, 600, bits=int(kind[1]))
        if kind.endswith("groups"):
            layer.codes = layer.codes.clamp(-8, 7)
            groups = torch.randint(1, 17, (150, 5), dtype=torch.uint8)
            packed = prepared_groups(layer, groups, 128, Output.totals()).packed
            layer.codes = (layer.codes * groups.repeat_interleave(128, 1)[:, :600].to(torch.int8)).to(torch.int8)
        else:
            packed = layer.prepare(Output.totals(), "triton").packed
        found = linear.linear(layer.x, packed, Output.totals(), int(kind[1]), config=config)
        assert torch.equal(found.long(), layer.totals())
        return
    group = 128 if kind.endswith("groups") else 0
    run, x, exact = floats(7, 150, 600, group=group, dtype=torch.float16)
    found = real_linear.real_linear(
        x, run.weight, run.scale, run.offset, run.bias, 150, run.decode == "e0m4", config=config
    )  # fmt: skip
    assert close(found, exact)


def prepared_groups(layer, groups, group, output, backend="triton"):
    return prepare(
        layer.codes, layer.scale, bias=layer.bias, weight_bits=4, input_scale=layer.x_scale,
        input_zero_point=layer.x_zero, output=output, multiplier=groups, group=group, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("group", layout.GROUPS)
def test_groups_count_as_products(group):
    for shape in ((3, 20, 16), (18, 70, 500), (80, 30, 2 * group + 1)):
        layer = make(*shape, bits=4)
        groups = torch.randint(1, 17, (shape[1], -(-shape[2] // group)), dtype=torch.uint8)
        for output in (Output.totals(), OUTPUTS["codes"]):
            run = prepared_groups(layer, groups, group, output)
            assert (run.spec.weight_bits, run.spec.group, run.choice.backend.name) == (4, group, "triton")
            expected = prepared_groups(layer, groups, group, output, "reference")
            assert expected.spec.weight_bits == 8 and torch.equal(run(layer.x), expected(layer.x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["codes16", "float32", "grid bfloat16"])
def test_16_bit_activations(bits, kind):
    layer = make(5, 66, 300, bits=bits, symmetric=False, activation_bits=16)
    layer.x[0] = 65535
    layer.codes[0] = -(2 ** (bits - 1))  # with 300 columns this sum leaves int32
    assert torch.equal(layer.prepare(OUTPUTS[kind], "triton")(layer.x), expected_of(layer, OUTPUTS[kind]))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 40), st.integers(1, 140), st.integers(1, 300), st.sampled_from([4, 8]), st.booleans())
def test_any_shape(m, n, k, bits, symmetric):
    layer = make(m, n, k, bits=bits, symmetric=symmetric)
    found = layer.prepare(OUTPUTS["codes"], "triton")(layer.x)
    assert found.shape == (m, n) and torch.equal(found, layer.prepare(OUTPUTS["codes"], "reference")(layer.x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("x_code", [0, 255])
def test_extreme_codes(bits, x_code):
    layer = make(2, 3, 2048, bits=bits)
    layer.x.fill_(x_code)
    layer.codes.fill_(-(2 ** (bits - 1)))
    layer.x_zero = 0
    assert torch.equal(layer.prepare(Output.totals(), "triton")(layer.x).long(), layer.totals())


def test_split_columns_give_the_same_bits_and_leave_no_trace():
    layer = make(3, 40, 1600, bits=4)
    run = layer.prepare(Output.totals(), "triton")
    for parts in (1, 3, 4):
        config = Config(32, 16, 4, 2, parts)
        found = linear.linear(layer.x, run.packed, Output.totals(), 4, config=config)
        assert torch.equal(found.long(), layer.totals()), parts
        assert not workspace_of(CPU).counters.any()


def test_a_counter_that_is_not_0_would_be_seen():
    layer = make(3, 40, 1600, bits=4)
    run = layer.prepare(Output.totals(), "triton")
    workspace_of(CPU).counters[0] = 1
    workspace_of(CPU).partial.fill_(12345)
    try:
        config = Config(32, 16, 4, 2, 8)
        assert not torch.equal(
            linear.linear(layer.x, run.packed, Output.totals(), 4, config=config).long(), layer.totals()
        )
    finally:
        workspace_of(CPU).counters.zero_()


def test_the_comparison_sees_one_wrong_byte():
    layer = make(4, 20, 40, bits=4)
    run = layer.prepare(Output.totals(), "triton")
    run.packed.weight[0, 3, 1] ^= 16
    assert int((run(layer.x).long() != layer.totals()).sum()) > 0


def test_any_strides_leading_axes_and_no_rows():
    layer = make(12, 70, 48)
    run = layer.prepare(OUTPUTS["codes"], "triton")
    expected = run(layer.x)
    wide = torch.full((12, 100), 3, dtype=torch.uint8)
    wide[:, :48] = layer.x
    assert torch.equal(run(wide[:, :48]), expected)
    assert torch.equal(run(layer.x.view(3, 2, 2, 48)), expected.view(3, 2, 2, 70))
    assert run(layer.x[:0]).shape == (0, 70) and run(layer.x.view(3, 4, 48)[:, :0]).shape == (3, 0, 70)


def test_tensors_of_another_layer_are_refused():
    layer, other = (make(3, n, 16).prepare(OUTPUTS["codes"], "triton") for n in (20, 150))
    x = make(3, 20, 16).x
    arguments = list(layer.arguments(x))
    operator = torch.ops.mobilequant.linear_w8a8
    with pytest.raises(ValueError, match="the weight was packed for another layer"):
        operator(*arguments[:1], other.packed.weight, *arguments[2:])
    with pytest.raises(ValueError, match="the multipliers were packed for another layer"):
        operator(*arguments[:3], other.packed.multiplier, *arguments[4:])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_operators(bits, activation_bits):
    layer = make(3, 20, 16, bits=bits, symmetric=False, activation_bits=activation_bits)
    run = layer.prepare(OUTPUTS["codes"], "triton")
    operator = getattr(torch.ops.mobilequant, f"linear_w{bits}a{activation_bits}").default
    torch.library.opcheck(operator, run.arguments(layer.x), test_utils=("test_schema", "test_faketensor"))


# 4-bit weights, floating-point activations -------------------------------------------------------------------------


def floats(m, n, k, *, group=0, dtype=torch.float16, decode="int4", offset=True, backend=None):
    """A layer, its input, and the exact result in float64."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    groups = -(-k // group) if group else 1
    scale = torch.rand(n, groups) * 0.1 + 0.05
    zero = torch.randint(-8, 8, (n, groups)) if offset else torch.zeros(n, groups, dtype=torch.int64)
    bias, x = torch.randn(n), torch.randn(m, k).to(dtype)
    run = prepare_weight_only(
        codes, scale, zero_point=zero if offset else None, bias=bias, group=group, decode=decode, backend=backend
    )  # fmt: skip
    step, less = (t.double().repeat_interleave(group or k, 1)[:, :k] for t in (scale, zero))
    return run, x, x.double() @ ((codes.double() - less) * step).t() + bias.double()


def close(found, exact, room=2**-10):
    return bool(((found.double() - exact).abs() <= room * exact.abs() + 2e-6 * exact.abs().max()).all())


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("group", [0, *layout.GROUPS])
@pytest.mark.parametrize("offset", [True, False])
def test_float_activations(decode, group, offset):
    for shape in ((1, 5, 20), (3, 70, 600), (70, 40, 2 * group + 33)):
        run, x, exact = floats(*shape, group=group, decode=decode, offset=offset)
        assert run.backend == "triton" and close(run(x), exact), shape


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("group", [0, 128])
def test_bfloat16_activations(decode, group):
    run, x, exact = floats(3, 70, 300, group=group, decode=decode, dtype=torch.bfloat16)
    assert run(x).dtype == torch.bfloat16 and close(run(x), exact, room=2**-7)


def test_both_decodings_of_every_code():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16, 2)
    for decode in DECODES:
        run = prepare_weight_only(codes, torch.ones(16), decode=decode)
        assert torch.equal(run(torch.eye(32, dtype=torch.float16)), codes.t().half())


def test_float_sums_do_not_depend_on_the_split_by_more_than_rounding_and_repeat():
    run, x, exact = floats(2, 30, 2000)
    config = Config(32, 16, 4, 2, 8)
    first, second = (
        real_linear.real_linear(x, run.weight, run.scale, run.offset, run.bias, 30, False, config=config)
        for _ in range(2)
    )
    assert torch.equal(first, second) and close(first, exact)


def test_the_operator_of_float_activations():
    run, x, _ = floats(3, 20, 40, group=32)
    arguments = run.arguments(x)
    operator = torch.ops.mobilequant.linear_w4_real.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert run(x.view(1, 3, 40)).shape == (1, 3, 20) and run(x[:0]).shape == (0, 20)


def test_tuning_measures_keeps_and_uses(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    autotune._known.cache_clear()
    layer = make(2, 40, 300, bits=4)
    run = layer.prepare(Output.totals(), "triton")
    fastest = Config(32, 16, 2, 3, 2)

    def measure(config):
        if config.stages == 8:
            raise RuntimeError("out of shared memory")
        return 1.0 if config == fastest else 2.0

    seconds = autotune.tune("w4a8", 40, 300, 2, CPU, measure)
    assert fastest in seconds and all(config.stages != 8 for config in seconds)
    autotune._known.cache_clear()  # as a new process reads it
    assert autotune.best("w4a8", 40, 300, 2, CPU) == fastest
    assert autotune.best("w4a8", 40, 300, 20, CPU) != fastest and autotune.best("w8a8", 40, 300, 2, CPU) != fastest
    assert torch.equal(run(layer.x).long(), layer.totals())
    autotune._known.cache_clear()


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a8-asym", "w4a8-g128"])
def test_a_model_keeps_packed_codes_alone(preset):
    model = quantize(build("llama-gqa"), None, config(preset))
    set_backend(model, "reference")
    stored, expected = {k: t.clone() for k, t in model.state_dict().items()}, logits_of(model)
    set_backend(model, "triton")
    assert {layer.backend for layer in served(model)} == {"triton"}
    for layer in (module for module in model.modules() if isinstance(module, QuantLinear)):
        assert layer.weight.holder is layer.kernel
        assert sum(codes.numel() for codes in layer.weight.parameters()) == 0
    now = model.state_dict()
    assert now.keys() == stored.keys() and all(torch.equal(tensor, stored[key]) for key, tensor in now.items())
    assert torch.equal(logits_of(model), expected)
