"""Groups, E0M4 and the AdpQ split, against their definitions."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_mobilequant.numerics.adpq import adpq_merge, adpq_split, outlier_count, outlier_mask, row_quantile
from optimum_mobilequant.numerics.affine import group_codes, group_values, pack_nibbles, unpack_nibbles
from optimum_mobilequant.numerics.e0m4 import e0m4_decode, e0m4_encode, e0m4_floats

shapes = st.tuples(st.integers(1, 6), st.integers(1, 70))


def matrix(shape, seed=0, tails=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (1 + tails * torch.rand(shape, generator=generator) ** 20)


@given(shapes, st.integers(0, 50))
def test_nibbles_come_back(shape, seed):
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (shape[0], -(-shape[1] // 2))
    assert torch.equal(unpack_nibbles(packed, shape[1]), codes)


@settings(deadline=None)
@given(shapes, st.sampled_from([3, 4]), st.sampled_from([8, 32]), st.integers(0, 50))
def test_a_group_is_rounded_to_nearest_on_its_own_range(shape, bits, group, seed):
    weight = matrix(shape, seed)
    codes, step, low = group_codes(weight, bits, group)
    assert codes.shape == weight.shape and step.shape == low.shape == (shape[0], -(-shape[1] // group))
    found = group_values(codes, step, low, group)
    for start in range(0, shape[1], group):
        part, values = weight[:, start : start + group], found[:, start : start + group]
        width = part.amax(1) - part.amin(1)
        assert torch.allclose(low[:, start // group], part.amin(1))
        assert ((values - part).abs().amax(1) <= width / (2**bits - 1) / 2 + 1e-6).all()
    searched = group_values(*group_codes(weight, bits, group, search=True), group)
    assert (searched - weight).square().sum() <= (found - weight).square().sum() + 1e-6


def test_e0m4_is_the_float16_with_the_nibble_on_top_of_the_mantissa():
    nibbles = torch.arange(16, dtype=torch.uint8)
    floats = e0m4_floats(nibbles)
    assert floats.dtype == torch.float16
    assert floats.tolist() == [1 + m / 16 for m in range(16)]


@given(shapes, st.sampled_from([8, 32, 128]), st.integers(0, 50))
def test_e0m4_holds_the_values_of_4_bit_groups(shape, group, seed):
    weight = matrix(shape, seed)
    packed, scale, offset = e0m4_encode(weight, group)
    codes, step, low = group_codes(weight, 4, group)
    assert torch.equal(unpack_nibbles(packed, shape[1]), codes)
    assert torch.allclose(
        e0m4_decode(packed, scale, offset, group, shape[1]), group_values(codes, step, low, group), atol=1e-5, rtol=0
    )


def test_e0m4_decodes_two_columns_of_a_byte_without_a_shift_of_the_nibbles():
    """What a kernel does: AND, OR, and the low nibble's shift folded into scale and offset."""
    weight = matrix((4, 64))
    packed, scale, offset = e0m4_encode(weight, 64)
    shifted = packed.to(torch.int16) << 2
    odd = (shifted & 0x03C0 | 0x3C00).view(torch.float16).float() * scale + offset
    even = (shifted & 0x003C | 0x3C00).view(torch.float16).float() * (16 * scale) + (offset - 15 * scale)
    expected = e0m4_decode(packed, scale, offset, 64, 64)
    assert torch.allclose(odd, expected[:, 1::2], atol=1e-5)
    assert torch.allclose(even, expected[:, 0::2], atol=1e-4)


@given(shapes, st.floats(0, 0.3), st.integers(0, 50))
def test_outliers_are_the_largest_of_each_row_and_no_others(shape, share, seed):
    weight = matrix(shape, seed)
    mask = outlier_mask(weight, share)
    count = outlier_count(shape[1], share)
    assert (mask.sum(1) == count).all()
    kept = weight.abs().masked_fill(mask, 0.0).amax(1)
    out = weight.abs().masked_fill(~mask, torch.inf).amin(1)
    assert (kept <= out).all()
    if count < shape[1]:
        assert torch.equal(row_quantile(weight, share)[:, 0], kept)


def test_the_split_is_the_closed_form_of_the_adaptive_lasso():
    """Brute force: argmin over v of (w - v)^2 / 2 + lambda |v| / |w| is 0 exactly where w^2 <= lambda."""
    weight = matrix((1, 50), seed=3).double()
    lam = row_quantile(weight, 0.1).square().item()
    grid = torch.linspace(-1.2, 1.2, 4801, dtype=torch.float64)[:, None] * weight.abs().max()
    cost = (weight - grid).square() / 2 + lam * grid.abs() / weight.abs()
    survives = grid[cost.argmin(0), 0].abs() > weight.abs().max() / 1000
    assert torch.equal(survives, outlier_mask(weight, 0.1)[0])


@settings(deadline=None)
@given(shapes, st.sampled_from([3, 4]), st.sampled_from([0.0, 0.05, 0.2]), st.integers(0, 50))
def test_merging_puts_each_weight_back_once(shape, bits, share, seed):
    weight = matrix(shape, seed)
    parts = adpq_split(weight, bits, 16, share)
    merged = adpq_merge(*parts, 16)
    mask = outlier_mask(weight, share)
    columns = parts[3].long()
    assert torch.equal(torch.zeros_like(mask).scatter(1, columns, True), mask)
    assert (columns.diff(dim=1) > 0).all()
    if mask.any():
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((merged - weight).abs() <= step / 2 + 1e-6)[mask].all()
    core = group_values(*parts[:3], 16)
    assert torch.equal(merged[~mask], core[~mask])


def test_no_outliers_is_round_to_nearest():
    weight = matrix((5, 64))
    assert torch.equal(adpq_merge(*adpq_split(weight, 4, 32, 0.0), 32), group_values(*group_codes(weight, 4, 32), 32))


@pytest.mark.parametrize("bits", [3, 4])
def test_outliers_apart_shrink_the_error_and_the_divergence_of_heavy_tails(bits):
    weight = matrix((64, 256), tails=8.0)
    plain = group_values(*group_codes(weight, bits, 128), 128)
    split = adpq_merge(*adpq_split(weight, bits, 128, 0.03), 128)
    assert (split - weight).square().mean() < 0.6 * (plain - weight).square().mean()

    def histogram(values):
        found = torch.histc(values, bins=60, min=-3, max=3) + 1e-3
        return found / found.sum()

    def kl(values):
        p, q = histogram(values), histogram(weight)
        return (p * (p / q).log()).sum()

    assert kl(split) < kl(plain)


def test_there_is_no_data_to_give():
    assert list(inspect.signature(adpq_split).parameters) == ["weight", "bits", "group", "share", "search"]
