"""Integer operations on single elements against exact fractions and the float function."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mobilequant.numerics import Grid, dequantize, quantize
from optimum_mobilequant.numerics import integer_elementwise as ops

U8, U16, S8 = Grid(8, False), Grid(16, False), Grid(8, True)
scales = st.floats(1e-3, 4.0)


@given(st.integers(-65535, 65535), st.integers(-65535, 65535), scales, scales)
def test_a_sum_is_rounded_once(a, b, first, second):
    found = int(ops.rescaled_sum(torch.tensor(a), torch.tensor(b), ops.shared_multipliers(first, second)))
    wanted = a * Fraction(first) + b * Fraction(second)
    assert abs(found - wanted) <= Fraction(1, 2) + Fraction(1, 2**11)
    # rounding each operand would be off by up to one step; once, the sum is the nearest integer but beside a tie
    if abs(wanted - round(wanted)) < Fraction(1, 2) - Fraction(1, 2**11):
        assert found == round(wanted)


def test_rotation_turns_pairs_and_passes_the_rest():
    x = torch.tensor([[[3, -5, 7, 11, 100, -200]]])
    cos, sin = torch.tensor([[[16384, 0]]]), torch.tensor([[[0, 16384]]])
    found = ops.rotate_pairs(x, cos, sin, 4) >> 14
    assert found.tolist() == [[[3, -11, 7, -5, 100, -200]]]


@pytest.mark.parametrize("grid", [U8, U16, S8], ids=str)
def test_a_table_holds_the_function_at_every_code(grid):
    scale, zero = torch.tensor(12.0 / 2**grid.bits), grid.qmin + 2 ** (grid.bits - 1)
    out = (torch.tensor(0.02), 15, U8)
    table = ops.lookup_table(torch.nn.functional.silu, scale, zero, grid, out)
    every = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int32).to(grid.dtype)
    values = torch.nn.functional.silu(dequantize(every, scale, torch.tensor(zero, dtype=torch.int32)))
    assert table.shape == (2**grid.bits,) and table.dtype is torch.uint8
    assert torch.equal(ops.look_up(every, table, grid), quantize(values, out[0], torch.tensor(15), U8))
    assert len(table.unique()) > 50
