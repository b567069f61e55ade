"""Scale, zero point and rounding against an independent numpy reference and against properties any affine grid has."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mobilequant.numerics import Grid, affine_qparams, dequantize, fake_quantize, quantize, weight_qparams

GRIDS = [Grid(4, True), Grid(8, True), Grid(16, True), Grid(8, False), Grid(16, False)]
grids = st.sampled_from(GRIDS)
ends = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
values = st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=40)


def encoding(low: float, high: float, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    return affine_qparams(torch.tensor(min(low, high)), torch.tensor(max(low, high)), grid)


def reference_codes(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The rule of ONNX QuantizeLinear: saturate(round_half_even(x / scale) + zero_point), in float32 as x is."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    rounded = np.rint(np.divide(x, scale, dtype=np.float32)).astype(np.float64)
    return np.clip(rounded + zero_point.astype(np.float64), low, high).astype(np.int64)


@pytest.mark.parametrize(
    ("bits", "signed", "low", "high", "dtype"),
    [
        (4, True, -8, 7, torch.int8),
        (8, True, -128, 127, torch.int8),
        (8, False, 0, 255, torch.uint8),
        (16, True, -32768, 32767, torch.int16),
        (16, False, 0, 65535, torch.int32),
        (32, True, -(2**31), 2**31 - 1, torch.int32),
    ],
)
def test_grid_bounds_fit_their_storage(bits, signed, low, high, dtype):
    grid = Grid(bits, signed)
    assert (grid.qmin, grid.qmax, grid.dtype) == (low, high, dtype)
    info = torch.iinfo(dtype)
    assert info.min <= low
    assert high <= info.max


@given(ends, ends, grids)
def test_zero_is_a_code_and_the_zero_point_lies_on_the_grid(low, high, grid):
    scale, zero_point = encoding(low, high, grid)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert torch.isfinite(scale)
    assert scale > 0
    assert grid.qmin <= int(zero_point) <= grid.qmax
    zero = torch.zeros(1)
    assert torch.equal(quantize(zero, scale, zero_point, grid).long(), zero_point.long().reshape(1))
    assert torch.equal(fake_quantize(zero, scale, zero_point, grid), zero)


@given(ends, ends, grids, st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_round_trip_is_within_half_a_step_inside_the_range(low, high, grid, shares):
    scale, zero_point = encoding(low, high, grid)
    # The representable interval; rounding the zero point shifts it by up to half a step against [low, high].
    first, last = ((torch.tensor(q) - zero_point).double() * scale.double() for q in (grid.qmin, grid.qmax))
    x = (first + torch.tensor(shares, dtype=torch.float64) * (last - first)).float()
    back = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    slack = 2e-7 * x.abs().max()  # float32 rounding of x / scale and of the product
    assert bool(((back - x).abs() <= scale * 0.5 * (1 + 1e-5) + slack).all())
    assert last - first <= (grid.qmax - grid.qmin) * scale.double() * (1 + 1e-12)


@given(ends, ends, grids)
def test_both_ends_of_the_range_are_reached_within_a_step(low, high, grid):
    scale, zero_point = encoding(low, high, grid)
    for end in (min(low, high, 0.0), max(low, high, 0.0)):
        back = float(fake_quantize(torch.tensor(end), scale, zero_point, grid))
        assert abs(back - end) <= float(scale) * (1 + 1e-5) + 2e-7 * abs(end)


@given(values, ends, ends, grids)
def test_codes_equal_the_numpy_reference(x, low, high, grid):
    scale, zero_point = encoding(low, high, grid)
    x = torch.tensor(x)
    expected = reference_codes(x.numpy(), scale.numpy(), zero_point.numpy(), grid.bits, grid.signed)
    codes = quantize(x, scale, zero_point, grid)
    assert codes.dtype == grid.dtype
    assert np.array_equal(codes.numpy().astype(np.int64), expected)
    floats = (expected - zero_point.numpy()).astype(np.float32) * scale.numpy()
    assert np.array_equal(dequantize(codes, scale, zero_point).numpy(), floats)


def test_ties_round_to_even():
    x, one, zero = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]), torch.tensor(1.0), torch.tensor(0)
    assert quantize(x, one, zero, Grid(8, True)).tolist() == [0, 2, 2, 0, -2, -2]
    assert fake_quantize(x, one, zero, Grid(8, True)).tolist() == [0, 2, 2, 0, -2, -2]


@given(values, ends, ends, grids)
def test_fake_quantize_is_quantize_then_dequantize_bit_for_bit(x, low, high, grid):
    scale, zero_point = encoding(low, high, grid)
    x = torch.tensor(x)
    expected = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    assert torch.equal(fake_quantize(x, scale, zero_point, grid), expected)
    with torch.enable_grad():
        tracked = fake_quantize(x.clone().requires_grad_(), scale, zero_point, grid)
    assert torch.equal(tracked.detach(), expected)


@given(values, ends, ends, grids)
def test_rounding_twice_changes_nothing(x, low, high, grid):
    scale, zero_point = encoding(low, high, grid)
    once = fake_quantize(torch.tensor(x), scale, zero_point, grid)
    assert torch.equal(fake_quantize(once, scale, zero_point, grid), once)


@given(values, st.sampled_from(GRIDS[3:4]))
def test_agrees_with_torch_fake_quantize(x, grid):
    # Codes agree except where torch's x * (1 / scale) and our x / scale fall on different sides of a tie.
    x = torch.tensor(x)
    scale, zero_point = affine_qparams(x.min(), x.max(), grid)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), grid.qmin, grid.qmax)
    ours = fake_quantize(x, scale, zero_point, grid)
    near_tie = ((x / scale).frac().abs() - 0.5).abs() < 1e-3
    assert torch.allclose(ours[~near_tie], theirs[~near_tie], rtol=1e-6, atol=0)
    assert bool(((ours - theirs).abs() <= scale * 1.001).all())


@pytest.mark.parametrize("low_precision", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_rounded_in_float32(low_precision):
    x = torch.randn(64).to(low_precision)
    scale, zero_point = affine_qparams(torch.tensor(-2.0), torch.tensor(3.0), Grid(8, False))
    out = fake_quantize(x, scale, zero_point, Grid(8, False))
    assert out.dtype == low_precision
    assert torch.equal(out, fake_quantize(x.float(), scale, zero_point, Grid(8, False)).to(low_precision))


@given(st.lists(ends, min_size=2, max_size=8), st.sampled_from(GRIDS[:3]))
def test_symmetric_weights_have_no_zero_point_and_cover_the_largest_magnitude(highs, grid):
    high = torch.tensor(highs).abs()[:, None]
    scale, zero_point = weight_qparams(-high, high, grid, True)
    assert not zero_point.any()
    codes = quantize(torch.cat([-high, high], 1), scale, zero_point, grid).long()
    alive = high.squeeze(1) > 1e-10
    assert bool((codes[alive] == torch.tensor([-grid.qmax, grid.qmax])).all())


def test_constant_zero_tensor_stays_zero_with_a_finite_scale():
    for grid in GRIDS:
        scale, zero_point = encoding(0.0, 0.0, grid)
        assert torch.isfinite(scale)
        assert scale > 0
        assert not fake_quantize(torch.zeros(3), scale, zero_point, grid).any()
