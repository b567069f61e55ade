"""The proximal step of MagR against its definition."""

import pytest
import torch

from optimum_mobilequant.rounding import project_l1, reduce_magnitude, shrink_maximum


def test_projection_by_hand():
    # (3, 1) on the ball of radius 2: both fall by 1. (1, 1, 0.5) on radius 2.2: all fall by 0.1. (0.3, 0.4): inside.
    rows = torch.tensor([[3.0, -1.0, 0.0], [1.0, 1.0, 0.5], [0.3, -0.4, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[2.0, 0.0, 0.0], [0.9, 0.9, 0.4], [0.3, -0.4, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(project_l1(rows, torch.tensor([2.0, 2.2, 1.0]).double()), expected)


def test_projection_is_the_nearest_point_of_the_ball():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 5, generator=generator, dtype=torch.float64) * 3
    radius = torch.rand(8, generator=generator, dtype=torch.float64) + 0.2
    found = project_l1(rows, radius)
    assert (found.abs().sum(1) <= radius + 1e-12).all()
    for _ in range(500):  # no other point of the ball is nearer
        other = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        other = other / other.abs().sum(1, keepdim=True) * radius[:, None]
        assert ((found - rows).norm(dim=1) <= (other - rows).norm(dim=1) + 1e-12).all()


def test_shrinking_the_maximum_levels_the_largest_by_hand():
    # argmin 1/2 (x - v)^2 + a max|x|, v = (3, -2, 0.5): with a = 1 only the 3 falls, to 2; with a = 3 both fall to 1.
    row = torch.tensor([[3.0, -2.0, 0.5]], dtype=torch.float64)
    for amount, expected in ((1.0, [2.0, -2.0, 0.5]), (3.0, [1.0, -1.0, 0.5]), (100.0, [0.0, 0.0, 0.0])):
        found = shrink_maximum(row, torch.tensor([amount]).double())
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_the_maximum_falls_and_the_output_hardly_changes():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 24, generator=generator, dtype=torch.float64)  # inputs span 6 of 24 directions
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    reduced = reduce_magnitude(weight, x.T @ x)
    assert reduced.abs().amax(1).mean() < 0.6 * weight.abs().amax(1).mean()
    assert (x @ (reduced - weight).T).norm() < 0.01 * (x @ weight.T).norm()


def test_uncorrelated_inputs_by_hand():
    # H = I: one proximal step, a = 0.25 * |w|_1 = 1.375. The 3 falls by 1 to 2, then 3 and 2 fall by 0.1875 each.
    weight = torch.tensor([[3.0, -2.0, 0.5]], dtype=torch.float64)
    found = reduce_magnitude(weight, torch.eye(3).double(), 0.25)
    torch.testing.assert_close(found, torch.tensor([[1.8125, -1.8125, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("hessian", [torch.zeros(24, 24).double(), torch.eye(24).double()])
def test_strength_zero_and_no_input_change_nothing(hessian):
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    strength = 0.0 if hessian.any() else 1e-3
    assert torch.equal(reduce_magnitude(weight, hessian, strength), weight)
