"""Two-level groups: whole multipliers of a row's scale."""

import pytest
import torch

from optimum_mobilequant.numerics import Grid, dequantize
from optimum_mobilequant.numerics.groups import fake_quantize_groups, group_units, groups_of, spread, two_levels
from optimum_mobilequant.numerics.packing import pack_int4, unpack_int4

INT4 = Grid(4, signed=True)


def test_units_of_a_ragged_matrix():
    matrix = torch.arange(10.0).view(2, 5)
    assert group_units(matrix, 3).tolist() == [[0, 1, 2], [3, 4, 0], [5, 6, 7], [8, 9, 0]]
    assert groups_of(5, 3) == 2 and groups_of(6, 3) == 2
    assert spread(torch.tensor([[1, 2], [3, 4]]), 3, 5).tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]


def test_two_levels_by_hand():
    scale = torch.tensor([[1.6, 0.8, 0.001], [0.16, 0.16, 0.16]])
    row, multiplier = two_levels(scale)
    torch.testing.assert_close(row, torch.tensor([[0.1], [0.01]]))
    assert multiplier.tolist() == [[16, 8, 1], [16, 16, 16]]


def test_products_are_8_bit_codes_for_every_code_and_multiplier():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    products = codes[:, None].int() * torch.arange(1, 17)[None, :]
    assert products.min() >= -128 and products.max() <= 127
    assert torch.equal(products.to(torch.int8).int(), products)
    packed = pack_int4(codes.view(-1, 1))
    assert torch.equal(unpack_int4(packed, 16).view(-1), codes)


def test_8_bit_codes_give_the_same_integer_product():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 40), generator=generator, dtype=torch.int8)
    multiplier = torch.randint(1, 17, (6, 3), generator=generator, dtype=torch.uint8)
    x = torch.randint(0, 256, (5, 40), generator=generator)
    wide = (codes * spread(multiplier, 16, 40).to(torch.int8)).long()
    by_group = torch.stack(
        [(x[:, i : i + 16] @ codes[:, i : i + 16].long().T) * multiplier[:, i // 16].long() for i in (0, 16, 32)]
    ).sum(0)
    assert torch.equal(x @ wide.T, by_group)


@pytest.mark.parametrize("columns", [32, 40])
def test_fake_quantization_gives_the_stored_values(columns):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(4, columns, generator=generator) * torch.rand(4, columns, generator=generator)
    values = fake_quantize_groups(matrix, None, INT4, 16)
    units = group_units(matrix, 16)
    row, multiplier = two_levels((units.abs().amax(1) / 7).view(4, -1))
    step = spread(multiplier, 16, columns) * row
    codes = (matrix / step).round().clamp(-8, 7)
    torch.testing.assert_close(values, codes * step)
    exact = dequantize((codes * spread(multiplier, 16, columns)).to(torch.int8), row, torch.zeros(4, 1).int())
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=0)
    whole = torch.round(matrix / (matrix.abs().amax(1, keepdim=True) / 7)) * (matrix.abs().amax(1, keepdim=True) / 7)
    assert (values - matrix).norm() < (whole - matrix).norm()


def test_gradients_reach_the_matrix_and_the_clipping():
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(3, 20, generator=generator).requires_grad_()
    share = torch.full((6, 1), 0.6, requires_grad=True)
    (fake_quantize_groups(matrix, share, INT4, 16) * torch.randn(3, 20, generator=generator)).sum().backward()
    assert torch.isfinite(matrix.grad).all() and matrix.grad.any()
    assert (share.grad != 0).all()
