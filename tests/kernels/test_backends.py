"""Every backend against plain integers and against the reference, on ragged shapes and extreme codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_mobilequant.kernels import BACKENDS, Output, cpp, onednn
from optimum_mobilequant.numerics import quantize
from tests.kernels.layers import OUTPUTS, U8, library, make, use, variants

SHAPES = [(1, 1, 1), (1, 256, 64), (2, 3, 5), (5, 64, 8), (6, 65, 12), (7, 130, 33), (16, 63, 100), (26, 70, 129)]


COMPILED = [name for name in variants() if name.startswith("cpp")]


@pytest.fixture(params=variants())
def backend(request, monkeypatch):
    return use(request.param, monkeypatch)


@pytest.fixture(params=["reference", *COMPILED])
def exact(request, monkeypatch):
    """The backends that return totals."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=["simulate", "reference", *COMPILED])
def wide(request, monkeypatch):
    """The backends that take 16-bit activations."""
    return use(request.param, monkeypatch)


def outputs_close(found, expected, output):
    """Codes within one step, the same in grid values, reals within float rounding."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    off = (found.double() - expected.double()).abs()
    if not output.qmax:
        step = expected.double().abs() * (2**-7 if output.dtype == torch.bfloat16 else 1e-5) + 1e-3
        return bool((off <= step).all())
    step = output.scale if output.dtype.is_floating_point else 1
    room = 1.01 * step + expected.double().abs() * (2**-7 if output.dtype == torch.bfloat16 else 0)
    return bool((off <= room).all()) and float((off > 0.5 * step).double().mean()) <= 0.02 + 1 / off.numel()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_totals_are_exact(exact, bits, symmetric):
    for shape in SHAPES:
        layer = make(*shape, bits=bits, symmetric=symmetric)
        found = layer.prepare(Output.totals(), exact)(layer.x)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), layer.totals()), shape


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(backend, kind, bits):
    for shape in SHAPES:
        layer, output = make(*shape, bits=bits, symmetric=bits == 8), OUTPUTS[kind]
        expected = layer.prepare(output, "reference")(layer.x)
        found = layer.prepare(output, backend)(layer.x)
        assert outputs_close(found, expected, output), shape
        if backend == "cpp":  # rounds by the same integer rule
            assert torch.equal(found, expected), shape


def test_the_comparison_sees_one_wrong_weight(backend):
    layer, output = make(4, 20, 40), OUTPUTS["codes"]
    expected = layer.prepare(output, "reference")(layer.x)
    layer.codes[3] = -layer.codes[3].clamp(-127)
    assert not outputs_close(layer.prepare(output, backend)(layer.x), expected, output)


def test_the_reference_rounds_the_exact_quotient():
    layer = make(9, 40, 60)
    for kind in ("codes", "codes16"):
        output = OUTPUTS[kind]
        factor = layer.scale.double() * layer.x_scale / output.scale
        expected = (layer.totals().double() * factor).round() + output.zero_point
        found = layer.prepare(output, "reference")(layer.x)
        assert torch.equal(found.double(), expected.clamp(0, output.qmax))
        assert len(found.unique()) > 100  # a constant would prove nothing


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("x_code", [0, 255])
@pytest.mark.parametrize("w_code", ["low", "high"])
def test_extreme_codes_do_not_saturate(backend, bits, x_code, w_code):
    # 255 * -128 + 255 * -128 does not fit 16 bits: where instructions add pairs in 16 bits, this shows it.
    layer = make(7, 70, 2048, bits=bits)
    layer.x.fill_(x_code)
    layer.codes.fill_(-(2 ** (bits - 1)) if w_code == "low" else 2 ** (bits - 1) - 1)
    layer.x_zero = 0
    layer.scale.fill_(1e-3)
    output = Output.real(torch.float32)
    expected = layer.totals().double() * layer.scale.double() * layer.x_scale
    found = layer.prepare(output, backend)(layer.x)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(bool(onednn.available()), reason=f"onednn: {onednn.available()}")
@pytest.mark.parametrize("x_code", [0, 255])
def test_onednn_takes_4_bit_weights_on_every_processor(x_code):
    # Also where 8-bit weights saturate: 255 * -15 + 255 * -15 fits 16 bits.
    for shape in SHAPES:
        layer = make(*shape, bits=4, symmetric=False)
        layer.x[: len(layer.x) // 2] = x_code
        layer.codes[::2], layer.zero_point[::2] = -8, 7
        for output in OUTPUTS.values():
            expected = layer.prepare(output, "reference")(layer.x)
            assert outputs_close(layer.prepare(output, "onednn")(layer.x), expected, output), shape
    assert onednn.supports(layer.prepare(OUTPUTS["codes"], "onednn").spec) is None


@pytest.mark.skipif(bool(onednn.available()), reason=f"onednn: {onednn.available()}")
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_onednn_takes_8_bit_weights_in_planes_where_it_saturates(activation_bits, monkeypatch):
    monkeypatch.setattr(onednn, "saturates", lambda: True)
    assert max(onednn.shifts(8, activation_bits)) > 0
    for shape in SHAPES:
        layer = make(*shape, activation_bits=activation_bits)
        layer.codes[::2] = -128
        layer.x[: len(layer.x) // 2] = 2**activation_bits - 1
        for output in OUTPUTS.values():
            expected = layer.prepare(output, "reference")(layer.x)
            assert outputs_close(layer.prepare(output, "onednn")(layer.x), expected, output), shape


def test_widest_layer_of_4_bits_is_exact(exact):
    layer = make(1, 1, 65793, bits=4)
    layer.x.fill_(255)
    layer.codes.fill_(-8)
    layer.x_zero = 0
    assert torch.equal(layer.prepare(Output.totals(), exact)(layer.x).long(), layer.totals())


@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(1, 140), st.integers(1, 150), st.sampled_from([4, 8]), st.booleans())
@pytest.mark.parametrize("variant", variants())
def test_any_shape(variant, m, n, k, bits, symmetric):
    with pytest.MonkeyPatch.context() as patch:
        name = use(variant, patch)
        layer, output = make(m, n, k, bits=bits, symmetric=symmetric or name == "onednn"), OUTPUTS["codes"]
        found = layer.prepare(output, name)(layer.x)
        assert found.shape == (m, n) and found.dtype == torch.uint8
        expected = layer.prepare(output, "reference")(layer.x)
        assert int((found.int() - expected.int()).abs().amax() if m else 0) <= (0 if name == "cpp" else 1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["codes16", "float32", "grid bfloat16"])
def test_16_bit_activations(wide, bits, symmetric, kind):
    output = OUTPUTS[kind]
    layer = make(5, 66, 300, bits=bits, symmetric=symmetric, activation_bits=16)
    layer.x[0] = 65535
    layer.codes[0] = -(2 ** (bits - 1))  # with 300 columns this sum leaves int32
    found, expected = layer.prepare(output, wide)(layer.x), layer.prepare(output, "reference")(layer.x)
    assert outputs_close(found, expected, output)
    if wide == "cpp":
        assert torch.equal(found, expected)
    if kind == "float32":
        exact = layer.totals().double() * layer.scale.double() * layer.x_scale
        assert torch.allclose(expected.double(), exact, rtol=1e-6, atol=1e-6)


def test_any_strides_and_leading_axes(backend):
    layer = make(12, 70, 48)
    run = layer.prepare(OUTPUTS["codes"], backend)
    expected = run(layer.x)
    wide = torch.full((12, 100), 3, dtype=torch.uint8)
    wide[:, :48] = layer.x
    spread = torch.full((12, 96), 3, dtype=torch.uint8)
    spread[:, ::2] = layer.x
    for view in (wide[:, :48], spread[:, ::2], layer.x.t().contiguous().t()):
        assert not view.is_contiguous() and torch.equal(run(view), expected)
    assert torch.equal(run(layer.x.view(3, 2, 2, 48)), expected.view(3, 2, 2, 70))
    assert torch.equal(run(layer.x.view(3, 4, 48).transpose(0, 1)), expected.view(3, 4, 70).transpose(0, 1))
    assert torch.equal(run(layer.x[5]), expected[5])
    assert torch.equal(run(layer.x[:1].expand(4, 48)), expected[:1].expand(4, 70))
    assert run(layer.x[:0]).shape == (0, 70) and run(layer.x.view(3, 4, 48)[:, :0]).shape == (3, 0, 70)


def test_the_same_bits_each_time_and_with_more_threads(backend):
    layer = make(64, 200, 256, bits=4)
    run = layer.prepare(OUTPUTS["float32"], backend)
    first = run(layer.x)
    assert torch.equal(run(layer.x), first)
    if BACKENDS[backend].integer:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            assert torch.equal(run(layer.x), first)
        finally:
            torch.set_num_threads(before)


def test_a_default_device_changes_nothing(backend):
    layer = make(3, 20, 16, bits=4)
    expected = layer.prepare(OUTPUTS["codes"], backend)(layer.x)
    with torch.device("meta"):  # as transformers loads models
        assert torch.equal(layer.prepare(OUTPUTS["codes"], backend)(layer.x), expected)


@pytest.mark.skipif(not COMPILED, reason=f"compiled kernels: {cpp.available()}")
def test_tensors_of_another_layer_are_refused():
    layer, other = (make(3, n, 16).prepare(OUTPUTS["codes"], "cpp") for n in (20, 84))
    x = make(3, 20, 16).x
    arguments = list(layer.arguments(x))
    operator = torch.ops.mobilequant.linear_w8a8
    with pytest.raises(ValueError, match="the weight was packed for another layer"):
        operator(*arguments[:1], other.packed.weight, *arguments[2:])
    with pytest.raises(ValueError, match="the multipliers were packed for another layer"):
        operator(*arguments[:3], other.packed.multiplier, *arguments[4:])
    with pytest.raises(ValueError, match="packed on cpu, and its input lies on meta"):
        operator(x.to("meta"), *arguments[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0173, 1.0, 0.5])
def test_quantized_activations_are_numerics_codes(backend, dtype, scale):
    x = torch.cat([torch.randn(1000) * 100 * scale, torch.arange(-300, 300) * scale * 0.5]).to(dtype)
    expected = quantize(x, torch.tensor(scale), torch.tensor(117), U8)
    x, expected = x.view(4, 400).t(), expected.view(4, 400).t()
    assert torch.equal(torch.ops.mobilequant.quantize(x, scale, 117, 8, backend), expected)


@pytest.mark.skipif(not COMPILED, reason=f"compiled kernels: {cpp.available()}")
def test_packed_4_bit_weights_take_half_a_byte():
    codes = make(1, 128, 512, bits=4).codes
    assert library().pack(codes, 4).numel() == 128 * 512 // 2 + 128 * 4  # and one int32 sum for each channel
    assert library().pack(codes, 8).numel() == 128 * 512 + 128 * 4
