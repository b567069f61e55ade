"""Matrices that rotations start from."""

import pytest
import torch

from optimum_mobilequant.transform.hadamard import hadamard, rotation


# Powers of two, cores of both of Paley's constructions, and widths of known models.
@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 60, 64, 80, 96, 192, 576, 896, 1536])
def test_hadamard_by_construction(n):
    h = hadamard(n)
    assert h.shape == (n, n)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 18, 50])
def test_sizes_that_have_none(n):
    assert hadamard(n) is None


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("n", [2, 6, 16, 50, 96])
def test_rotations_are_orthogonal_and_seeded(n, keeps_mean):
    q = rotation(n, 3, keeps_mean=keeps_mean)
    eye, ones = torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    assert (q @ q.T - eye).abs().max() <= 1e-12
    assert torch.equal(q, rotation(n, 3, keeps_mean=keeps_mean))
    assert n < 6 or not torch.equal(q, rotation(n, 4, keeps_mean=keeps_mean))
    assert n == 2 or bool((q @ ones - ones).abs().max() <= 1e-12) is keeps_mean


def test_a_hadamard_rotation_levels_one_large_channel():
    q, x = rotation(96, 0), torch.zeros(96, dtype=torch.float64)
    x[17] = 30.0
    assert torch.allclose((q @ x).abs(), torch.full((96,), 30 / 96**0.5, dtype=torch.float64))
