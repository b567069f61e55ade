"""The column-by-column rounding against cases done by hand and against rounding to nearest."""

import pytest
import torch

from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.rounding import Compensation, InputMoments, compensate, row_errors

INT4 = Grid(4, signed=True)
ONE, ZERO = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
TINY = Compensation(damping=1e-9, act_order=False)


def moments(x, y=None):
    x = x.double()
    return InputMoments(x.T @ x, None if y is None else x.T @ y.double())


def codes(weight, m, options=TINY, scale=ONE, zero_point=ZERO, grid=INT4):
    place = compensate(weight, m, scale, zero_point, grid, options)
    return (place.round() + zero_point).clamp(grid.qmin, grid.qmax)


def correlated(tokens=64, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix


def weights(rows=16, columns=24, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.5


def test_two_columns_by_hand():
    # H = [[2, 1], [1, 1]]. Column 0: 0.4 -> 0, error 0.4; the best column 1 is then 0.3 + 0.4 * 1/1 = 0.7 -> 1, where
    # rounding to nearest has 0: error (0.4, -0.3) with H is 0.17, that of (0.4, 0.3) is 0.65.
    m = InputMoments(torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double())
    weight = torch.tensor([[0.4, 0.3]])
    assert codes(weight, m).tolist() == [[0.0, 1.0]]
    found, nearest = (row_errors(weight.double(), torch.tensor([q]).double(), m) for q in ([0.0, 1.0], [0.0, 0.0]))
    assert found.item() == pytest.approx(2 * 0.16 - 2 * 0.4 * 0.7 + 0.49, abs=1e-6)
    assert nearest.item() == pytest.approx(0.65, abs=1e-6)


def test_large_inputs_go_first_with_act_order():
    # In the order as it is, column 0 (small inputs) is rounded first and column 1 pays for it.
    m = InputMoments(torch.tensor([[1.0, 1.5], [1.5, 4.0]]).double())
    weight = torch.tensor([[0.45, 0.3]])
    by_hand = {False: [[0.0, 0.0]], True: [[1.0, 0.0]]}
    # ordered: 0.3 -> 0, then 0.45 + 0.3 * 1.5 / 1 = 0.9 -> 1; as it is: 0.45 -> 0, then 0.3 + 0.45 * 1.5 / 4 = 0.47
    for act_order, expected in by_hand.items():
        assert codes(weight, m, Compensation(1e-9, act_order)).tolist() == expected


@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_round_to_nearest(act_order):
    weight = weights()
    m = InputMoments(torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.1).double())
    assert torch.equal(codes(weight, m, Compensation(0.01, act_order)), weight.round().clamp(-8, 7))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("zero", [0, 2])
def test_no_row_is_worse_than_nearest_and_most_are_better(cross, zero):
    x, weight, scale = correlated(), weights(), torch.full((16, 1), 0.7)
    m = moments(x, x + 0.3 * correlated(seed=5) if cross else None)
    zero_point = torch.full((16, 1), zero, dtype=torch.int32)
    found = (codes(weight, m, Compensation(), scale, zero_point) - zero_point) * scale
    nearest = ((weight / scale).round() + zero_point).clamp(-8, 7).sub(zero_point) * scale
    errors = [row_errors(weight.double(), values.double(), m) for values in (found, nearest)]
    if cross:
        errors = [e + ((x.double() + 0.0) @ weight.double().T).square().sum() for e in errors]
    assert (errors[0] <= errors[1] + 1e-9).all()
    assert (errors[0] < errors[1]).float().mean() > 0.7


def test_a_row_that_compensation_would_spoil_stays_nearest():
    """Without the comparison by row some rows end worse: the guard is not idle."""
    x, weight = correlated(seed=3), weights(rows=400, seed=4).clamp(-1.2, 1.2) * 8
    m, loose = moments(x), Compensation(damping=1.0, act_order=False)
    place = compensate(weight, m, ONE, ZERO, INT4, loose)
    assert (place == weight).all(1).any() and (place != weight).any(1).any()


def test_columns_without_input_round_to_nearest():
    x, weight = correlated(), weights()
    x[:, [0, 7, 23]] = 0
    found = codes(weight, moments(x), Compensation())
    assert torch.equal(found[:, [0, 7, 23]], weight[:, [0, 7, 23]].round().clamp(-8, 7))
    assert not torch.equal(found, weight.round().clamp(-8, 7))


def test_no_input_at_all_rounds_to_nearest():
    weight = weights()
    assert torch.equal(codes(weight, InputMoments(torch.zeros(24, 24).double())), weight.round().clamp(-8, 7))


@pytest.mark.parametrize("block", [1, 5, 24, 128])
@pytest.mark.parametrize("cross", [False, True])
def test_the_block_changes_nothing(block, cross):
    x, weight = correlated(), weights()
    m = moments(x, x + 0.1 * correlated(seed=5) if cross else None)
    expected = codes(weight, m, Compensation(block=7))
    assert torch.equal(codes(weight, m, Compensation(block=block)), expected)


def test_more_columns_than_tokens():
    x, weight = correlated(tokens=6), weights()
    found = codes(weight, moments(x), Compensation())
    error, nearest = (
        row_errors(weight.double(), q.double(), moments(x)).sum() for q in (found, weight.round().clamp(-8, 7))
    )
    assert error < 0.5 * nearest


def test_equal_inputs_make_qronos_gptq():
    x, weight = correlated(), weights()
    assert torch.equal(codes(weight, moments(x, x), Compensation()), codes(weight, moments(x), Compensation()))


def test_the_difference_to_the_float_inputs_is_corrected():
    """The quantized inputs are the float ones times 0.8: the best weight is 1.25 times as large."""
    x, weight = correlated(tokens=200), weights() * 0.6
    found = codes(weight, moments(0.8 * x, x), Compensation())
    other = codes(weight, moments(0.8 * x), Compensation())
    output = x @ weight.T

    def loss(q):
        return (0.8 * x @ q.T - output).square().sum()

    assert loss(found) < 0.5 * loss(other)


def test_input_that_is_not_finite_is_refused():
    hessian = torch.eye(24).double()
    hessian[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite on the calibration text"):
        codes(weights(), InputMoments(hessian))


def test_a_hessian_that_is_not_positive_names_the_damping():
    hessian = torch.eye(2).double()
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(ValueError, match="raise rounding_damping"):
        codes(torch.ones(1, 2), InputMoments(hessian))
