"""Integer arithmetic against exact fractions and Python's integers."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.numerics import integer as ops
from optimum_mobilequant.numerics.integer import Multiplier, Operand

U8, U16, S4, S8, S16 = Grid(8, False), Grid(16, False), Grid(4, True), Grid(8, True), Grid(16, True)


def exact(multiplier, index=()):
    return Fraction(int(multiplier.mantissa[index])) / 2 ** int(multiplier.shift[index])


def requantized(accumulator, multiplier, dtype):
    return int(ops.requantize(torch.tensor(accumulator, dtype=dtype), multiplier))


reals = st.floats(2.0**-32, 2.0**17, allow_subnormal=False).flatmap(lambda x: st.sampled_from([x, -x]))
accumulators = st.integers(-(2**31), 2**31 - 1)
wide = st.integers(-(2**43) + 1, 2**43 - 1)


@given(reals)
def test_a_multiplier_has_31_bits(real):
    multiplier = Multiplier.of(real)
    assert abs(exact(multiplier) / Fraction(real) - 1) <= Fraction(1, 2**31)
    assert 2**30 <= abs(int(multiplier.mantissa)) < 2**31
    assert 13 <= int(multiplier.shift) <= 62


@given(st.floats(0, 2.0**-32))
def test_a_small_multiplier_loses_bits_but_not_its_place(real):
    multiplier = Multiplier.of(real)
    assert int(multiplier.shift) <= 62
    assert abs(exact(multiplier) - Fraction(real)) <= Fraction(1, 2**63)


def test_a_multiplier_rounds_up_into_the_next_power_of_two():
    multiplier = Multiplier.of(1 - 2.0**-40)
    assert (int(multiplier.mantissa), int(multiplier.shift)) == (2**30, 30)


@pytest.mark.parametrize("real", [float("nan"), float("inf")])
def test_a_multiplier_must_be_finite(real):
    with pytest.raises(ValueError, match="not finite"):
        Multiplier.of(real)


@pytest.mark.parametrize("real", [2.0**18, 1e30])
def test_beyond_the_largest_multiplier_every_accumulator_but_0_saturates(real):
    steps = ops.requantize(torch.tensor([-1, 0, 1], dtype=torch.int32), Multiplier.of(real))
    assert ops.to_grid(steps, 1000, U16).tolist() == [0, 1000, 65535]


@given(accumulators, reals)
def test_requantize_rounds_the_exact_product_half_to_even(accumulator, real):
    multiplier = Multiplier.of(real)
    assert requantized(accumulator, multiplier, torch.int32) == round(accumulator * exact(multiplier))


@given(wide, reals)
def test_requantize_of_wide_accumulators_rounds_the_exact_product(accumulator, real):
    multiplier = Multiplier.of(real)
    assert requantized(accumulator, multiplier, torch.int64) == round(accumulator * exact(multiplier))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ties_go_to_even(dtype):
    halves = torch.tensor([-5, -3, -1, 1, 3, 5], dtype=dtype)
    assert ops.requantize(halves, Multiplier.of(0.5)).tolist() == [-2, -2, 0, 0, 2, 2]


def test_a_tie_is_none_when_bits_below_it_are_set():
    """The low part of a wide product is shifted out before rounding; forgetting it would make a tie of this."""
    multiplier = Multiplier(torch.tensor(2**30 + 1), torch.tensor(43))
    accumulator = 2**12  # times M: 1/2 + 2**-31
    assert requantized(accumulator, multiplier, torch.int64) == 1
    assert requantized(accumulator, Multiplier(torch.tensor(2**30), torch.tensor(43)), torch.int64) == 0


def test_channels_have_multipliers_of_their_own():
    found = ops.requantize(torch.full((3, 4), 100, dtype=torch.int32), Multiplier.of(torch.tensor([0.0, 0.5, 1, -2])))
    assert found.tolist() == [[0, 50, 100, -200]] * 3


@given(st.integers(-(2**62) + 1, 2**62 - 1), st.integers(1, 62))
def test_rounding_shift(value, shift):
    assert int(ops.rounding_shift(torch.tensor(value), shift)) == round(Fraction(value, 2**shift))


@given(st.integers(-(2**60), 2**60), st.integers(1, 2**60))
def test_rounding_divide(value, divisor):
    found = int(ops.rounding_divide(torch.tensor(value), torch.tensor(divisor)))
    assert found == round(Fraction(value, divisor))


def codes(grid, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator).to(grid.dtype)


@pytest.mark.parametrize("grid_b", [U8, S4, S8, U16], ids=str)
@pytest.mark.parametrize("grid_a", [U8, U16, S16], ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_matmul_is_exact(grid_a, grid_b, batch):
    a, b = codes(grid_a, (*batch, 5, 37)), codes(grid_b, (*batch, 37, 4), seed=1)
    zero_a = (grid_a.qmin + grid_a.qmax) // 3
    zero_b = torch.tensor([grid_b.qmin, 0 if grid_b.signed else 7, grid_b.qmax, 1])
    wanted = (a.long() - zero_a) @ (b.long() - zero_b)
    found = ops.integer_matmul(Operand.of(a, zero_a, grid_a), Operand.of(b, zero_b, grid_b))
    assert torch.equal(found.long(), wanted)


def test_matmul_of_a_batch_with_one_matrix_and_a_bias():
    a, b, bias = codes(U8, (2, 3, 5, 16)), codes(S8, (16, 6)), torch.arange(6) * 1000 - 2**30
    found = ops.integer_matmul(Operand.of(a, 100, U8), Operand.of(b, 0, S8), bias=bias)
    assert torch.equal(found.long(), (a.long() - 100) @ b.long() + bias)


@pytest.mark.parametrize(
    ("grid_a", "grid_b", "zero", "longest"),
    # Lengths at which int32 still holds every sum, from the grids alone.
    [(U8, S8, 0, 65793), (U8, S4, 0, 1052688), (U16, S8, 0, 256), (S16, S8, 0, 511), (U16, U8, 0, 128)],
    ids=str,
)
def test_the_accumulator_is_as_wide_as_it_must_be(grid_a, grid_b, zero, longest):
    bounds = [Operand.of(codes(g, (1, 1)), zero, g).bound for g in (grid_a, grid_b)]
    per_product = bounds[0] * bounds[1]
    assert ops.accumulator_dtype(longest * per_product) is torch.int32
    assert ops.accumulator_dtype((longest + 1) * per_product) is torch.int64


def test_sums_beyond_32_bits_are_exact():
    length = 600
    a, b = torch.full((1, length), 65535, dtype=torch.int32), torch.full((length, 1), -128, dtype=torch.int8)
    found = ops.integer_matmul(Operand.of(a, 0, U16), Operand.of(b, 0, S8))
    assert found.dtype is torch.int64 and int(found) == -128 * 65535 * length < -(2**31)
    short = ops.integer_matmul(Operand.of(a[:, :100], 0, U16), Operand.of(b[:100], 0, S8))
    assert short.dtype is torch.int32


def test_a_sum_beyond_43_bits_is_refused():
    with pytest.raises(ValueError, match="beyond 43 bits"):
        ops.accumulator_dtype(2**43)
    with pytest.raises(ValueError, match="up to 16 bits"):
        Operand.of(torch.zeros(1, 1, dtype=torch.int32), 0, Grid(32, True))


def test_byte_products_of_long_rows_do_not_wrap():
    a = torch.full((1, 2**17), -128, dtype=torch.int8)
    assert int(ops.byte_matmul(a, a.t())) == 2**31


def test_products_of_length_1_are_exact_in_either_layout():
    a, b = codes(S8, (5, 1)), codes(S8, (7, 1))
    assert torch.equal(ops.byte_matmul(a, b.t()).long(), a.long() @ b.t().long())
    assert torch.equal(ops.byte_matmul(a, b.t().contiguous()).long(), a.long() @ b.t().long())


@pytest.mark.parametrize("exact_kernel", [True, False])
def test_both_ways_to_multiply_bytes_agree(monkeypatch, exact_kernel):
    monkeypatch.setattr(ops, "_fast_product_is_exact", lambda: exact_kernel)
    a, b = codes(S8, (2, 3, 70)), codes(S8, (2, 70, 5))
    assert torch.equal(ops.byte_matmul(a, b).long(), a.long() @ b.long())
    assert torch.equal(ops.byte_matmul(a, b[0]).long(), a.long() @ b[0].long())


def test_a_kernel_that_saturates_is_not_used(monkeypatch):
    ops._fast_product_is_exact.cache_clear()
    real = torch._int_mm

    def saturating(a, b):
        even, odd = real(a[:, ::2].contiguous(), b[::2].contiguous()), real(a[:, 1::2].contiguous(), b[1::2])
        return (even + odd).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not ops._fast_product_is_exact()
    ops._fast_product_is_exact.cache_clear()
