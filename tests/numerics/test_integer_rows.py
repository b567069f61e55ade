"""Integer norms and softmax against exact arithmetic."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_mobilequant.numerics.integer_rows import (
    ExpTables,
    NormConstants,
    bit_length,
    integer_softmax,
    integer_sqrt,
    normalise,
)


@given(st.integers(2**60, 2**62 - 1))
def test_the_square_root_is_the_nearest_integer(value):
    found = int(integer_sqrt(torch.tensor([value])))
    floor = math.isqrt(value)
    assert found == floor + (value - floor * floor > floor)


def test_square_roots_at_squares_and_beside_them():
    roots = [2**30, 2**30 + 1, 2**31 - 1, 1518500249]
    values = torch.tensor([r * r + d for r in roots for d in (0, 1)])
    assert integer_sqrt(values).tolist() == [r for r in roots for _ in (0, 1)]


@given(st.integers(0, 2**62))
def test_bit_length(value):
    assert int(bit_length(torch.tensor([value]))) == value.bit_length()


def exact_norm(x, gain, *, scale, out_scale, eps, centre, bias=None):
    """Real-valued steps of the output, to 40 digits."""
    with localcontext() as context:
        context.prec = 40
        n = len(x)
        mean = Fraction(sum(x), n) if centre else Fraction(0)
        mean_square = sum((v - mean) ** 2 for v in x) / n + Fraction(eps) / Fraction(scale) ** 2
        root = (Decimal(mean_square.numerator) / Decimal(mean_square.denominator)).sqrt()
        out = []
        for i, value in enumerate(x):
            top = (value - mean) * Fraction(gain[i]) / Fraction(out_scale)
            steps = Decimal(top.numerator) / Decimal(top.denominator) / root if root else Decimal(0)
            out.append(float(steps + (Decimal(bias[i]) / 2**15 if bias else 0)))
        return out


rows = st.integers(2, 24).flatmap(lambda n: st.lists(st.integers(-65535, 65535), min_size=n, max_size=n))


@settings(max_examples=100)
@given(
    rows,
    st.sampled_from([1e-5, 1e-3, 0.02, 1.0]),
    st.sampled_from([1e-6, 1e-5, 1e-2]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-4, 0.03]),
)
def test_a_norm_is_the_nearest_step(x, scale, eps, centre, with_bias, out_scale):
    gain = [(-1) ** i * (0.25 + 0.37 * i) for i in range(len(x))]
    bias = [(-1) ** i * (i * 98765 + 4321) for i in range(len(x))] if with_bias else None
    options = {"out_scale": out_scale, "eps": eps, "centre": centre}
    wanted = exact_norm(x, gain, scale=scale, bias=bias, **options)
    constants = NormConstants.of(
        torch.tensor(gain, dtype=torch.float64), in_scale=scale, in_bound=65535,
        bias=None if bias is None else torch.tensor(bias, dtype=torch.int32), **options,
    )  # fmt: skip
    found = normalise(torch.tensor([x]), constants)[0].tolist()
    for i, (got, real) in enumerate(zip(found, wanted, strict=True)):
        # half a step, and root, reciprocal, fixed point and multiplier; with a bias, the parts may cancel
        size = abs(real) + (abs(bias[i]) / 2**15 if with_bias else 0)
        assert abs(got - real) <= 0.5 + size * 2**-28 + 2**-20


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("value", [0, 1, -3])
def test_rows_that_are_constant_or_nearly_nothing(centre, value):
    x = [value] * 8
    gain = [1.0] * 8
    options = {"out_scale": 1e-3, "eps": 1e-5, "centre": centre}
    constants = NormConstants.of(torch.ones(8, dtype=torch.float64), in_scale=0.01, in_bound=65535, **options)
    wanted = exact_norm(x, gain, scale=0.01, **options)
    assert normalise(torch.tensor([x]), constants)[0].tolist() == [round(v) for v in wanted]


def test_a_row_of_zeros_without_eps_is_zero():
    constants = NormConstants.of(
        torch.ones(4, dtype=torch.float64), in_scale=1.0, in_bound=255, out_scale=0.01, eps=0.0, centre=False
    )
    assert normalise(torch.zeros(1, 4, dtype=torch.int64), constants).tolist() == [[0] * 4]


def test_eps_counts_where_the_row_is_small():
    """The scale cancels everywhere but in eps: with the eps of another scale this fails."""
    x, options = [3, -2, 1, 2], {"out_scale": 1e-4, "eps": 1e-5, "centre": False}
    found = []
    for scale in (1e-3, 1.0):
        constants = NormConstants.of(torch.ones(4, dtype=torch.float64), in_scale=scale, in_bound=65535, **options)
        found.append(normalise(torch.tensor([x]), constants)[0].tolist())
        assert found[-1] == [round(v) for v in exact_norm(x, [1.0] * 4, scale=scale, **options)]
    assert found[0] != found[1]


def test_wide_rows_at_the_extremes_do_not_overflow():
    n = 2**14
    x = torch.full((1, n), 65535)
    x[0, ::2] = -65535
    constants = NormConstants.of(
        torch.ones(n, dtype=torch.float64), in_scale=0.01, in_bound=65535, out_scale=1e-4, eps=1e-6, centre=True
    )
    assert normalise(x, constants).unique().tolist() == [-10000, 10000]
    alone = torch.zeros(1, n, dtype=torch.int64)
    alone[0, 5] = 65535
    assert int(normalise(alone, constants).max()) == round(math.sqrt(n - 1) * 1e4)
    with pytest.raises(ValueError, match="the widest"):
        NormConstants.of(torch.ones(n + 1), in_scale=1.0, in_bound=255, out_scale=1.0, eps=0.0, centre=False)


def test_an_input_that_is_nothing_beside_eps_is_refused():
    with pytest.raises(ValueError, match="too small beside eps"):
        NormConstants.of(torch.ones(8), in_scale=1e-24, in_bound=65535, out_scale=1.0, eps=1e-5, centre=False)


@given(st.integers(0, 65535), st.floats(1e-5, 0.5))
def test_the_two_tables_give_the_exponential(distance, scale):
    found = int(ExpTables.of(scale)(torch.tensor([distance])))
    assert abs(found - math.exp(-distance * scale) * 2**30) <= 1.6  # half a unit of each table and of the product
    if distance * scale >= 24:
        assert found == 0


def test_a_distance_of_20_nats_is_not_yet_nothing():
    assert int(ExpTables.of(1e-3)(torch.tensor([20000]))) > 0


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=40), st.floats(1e-5, 0.2), st.sampled_from([255, 65535]))
def test_probabilities_are_the_nearest_codes(codes, scale, qmax):
    found = integer_softmax(torch.tensor([codes]), ExpTables.of(scale), qmax)[0].tolist()
    weights = [math.exp((code - max(codes)) * scale) for code in codes]
    for got, weight in zip(found, weights, strict=True):
        assert abs(got - weight / sum(weights) * qmax) <= 0.5 + 1e-8 * qmax * len(codes)
    assert abs(sum(found) - qmax) <= len(codes) / 2 + 1


def test_hidden_positions_get_nothing_and_ties_go_to_even():
    tables = ExpTables.of(24 / 1000)
    found = integer_softmax(torch.tensor([[0, 1000, 1000, 0, 0]]), tables, 65535)
    assert found.tolist() == [[0, 32768, 32768, 0, 0]]
    assert integer_softmax(torch.tensor([[7, 7]]), tables, 255).tolist() == [[128, 128]]
    shown = integer_softmax(torch.tensor([[600, 1000]]), tables, 65535)
    assert shown[0, 0] > 0  # negative control: at 9.6 nats something is left
