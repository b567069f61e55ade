"""Gradients of the fused autograd nodes against the same arithmetic written with elementary operations."""

import itertools

import pytest
import torch
from torch import Tensor

from optimum_mobilequant.numerics import (
    Grid,
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_offset,
    fake_quantize_open,
    fake_quantize_weight,
)
from optimum_mobilequant.numerics.fake import round_straight_through

GRID = Grid(8, False)


def elementary(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    codes = (x / scale + ((x / scale).round() - x / scale).detach() + zero_point).clamp(grid.qmin, grid.qmax)
    return (codes - zero_point) * scale


def elementary_weight(weight, rows, columns, clip, grid, *, symmetric, per_channel):
    """Transform, range, clipping, scale, zero point, rounding: autograd sees every step."""
    scaled = weight
    if rows is not None:
        scaled = scaled * rows.exp()[:, None]
    if columns is not None:
        scaled = scaled * columns.exp()[None, :]
    view = scaled if per_channel else scaled.reshape(1, -1)
    low, high = view.min(1, keepdim=True).values.clamp(max=0), view.max(1, keepdim=True).values.clamp(min=0)
    share = torch.ones(len(view), 2, dtype=weight.dtype) if clip is None else torch.sigmoid(clip)
    if symmetric:
        scale = view.abs().max(1, keepdim=True).values * share[:, 1:] / grid.qmax
        zero_point = torch.zeros_like(scale)
    else:
        low, high = low * share[:, :1], high * share[:, 1:]
        scale = (high - low) / (grid.qmax - grid.qmin)
        offset = grid.qmin - low / scale
        zero_point = (offset + (offset.round() - offset).detach()).clamp(grid.qmin, grid.qmax)
    return elementary(scaled, scale, zero_point, grid)


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    size = float(theirs.abs().max())
    assert size > 0, "a gradient of zero would prove nothing"
    assert float((ours - theirs).abs().max()) <= 2e-5 * size


@pytest.mark.parametrize("zero", [0.0, 100.0, 255.0])
def test_gradients_of_a_learned_activation_encoding(zero):
    x = (torch.randn(6, 50) * 3).requires_grad_()
    scale, zero_point = torch.tensor(0.021, requires_grad=True), torch.tensor(zero, requires_grad=True)
    upstream = torch.randn(6, 50)
    ours_out = fake_quantize_learned(x, scale, zero_point, GRID)
    ours = torch.autograd.grad(ours_out, (x, scale, zero_point), upstream)
    exact = [t.detach().double().requires_grad_() for t in (x, scale, zero_point)]
    theirs_out = elementary(*exact, GRID)
    theirs = torch.autograd.grad(theirs_out, exact, upstream.double())
    assert torch.allclose(ours_out.double(), theirs_out, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        close(a.double(), b)


def test_gradient_passes_inside_and_stops_outside_a_fixed_encoding():
    x = torch.tensor([-1.0, -0.04, 0.0, 1.0, 12.75, 12.79, 20.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.05), torch.tensor(0), GRID).sum().backward()
    # the outermost code owns its full half step, so 12.76 + 0.02 still rounds to a code
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_open_range_rounds_alike_and_lets_every_gradient_pass():
    x = torch.tensor([-1.0, 0.0, 0.312, 12.0, 20.0], requires_grad=True)
    scale, zero_point = torch.tensor(0.05), torch.tensor(3, dtype=torch.int32)
    out = fake_quantize_open(x, scale, zero_point, GRID)
    assert torch.equal(out.detach(), fake_quantize(x.detach(), scale, zero_point, GRID))
    upstream = torch.randn(5)
    out.backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_keeps_the_dtype_of_the_input(dtype):
    x = torch.randn(8).to(dtype).requires_grad_()
    out = fake_quantize_learned(x, torch.tensor(0.02), torch.tensor(128.0), GRID)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == dtype


# (clipped, which logs)
_LEARNED = [(c, logs) for c in (True, False) for logs in ("none", "rows", "columns", "both")]


@pytest.mark.parametrize(("clipped", "logs"), _LEARNED)
@pytest.mark.parametrize(
    ("bits", "symmetric", "per_channel"), list(itertools.product((4, 8), (True, False), (True, False)))
)
def test_gradients_of_a_weight(bits, symmetric, per_channel, clipped, logs):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(10, 14, generator=generator)
    weight[3] = weight[3].abs() + 0.1  # a row of one sign: its range is widened to hold zero
    weight[4, 5] = 0.0
    rows = torch.randn(10, generator=generator) * 0.3 if logs in ("rows", "both") else None
    columns = torch.randn(14, generator=generator) * 0.3 if logs in ("columns", "both") else None
    clip = torch.rand(10 if per_channel else 1, 2, generator=generator) * 3 if clipped else None
    upstream = torch.randn(10, 14, generator=generator)
    scheme = {"symmetric": symmetric, "per_channel": per_channel}
    learned = [t for t in (weight, rows, columns, clip) if t is not None]

    def gradients(function, dtype):
        copies = {id(t): t.detach().to(dtype).requires_grad_() for t in learned}
        parts = [None if t is None else copies[id(t)] for t in (weight, rows, columns, clip)]
        out = function(*parts, Grid(bits, True), **scheme)
        return out, torch.autograd.grad(out, list(copies.values()), upstream.to(dtype))

    ours_out, ours = gradients(fake_quantize_weight, torch.float32)
    # float32 for both: in float64 single elements would fall on the other side of a tie
    theirs_out, theirs = gradients(elementary_weight, torch.float32)
    assert torch.allclose(ours_out, theirs_out, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        if symmetric and a.shape[-1:] == (2,) and a.ndim == 2:
            assert not a[:, 0].any()  # a symmetric range has one end
        close(a, b)


def test_scale_of_a_weight_follows_its_transform():
    """A row's own scale must cancel in its codes: dividing a row by s divides its step by s."""
    weight, logs = torch.randn(5, 8), torch.randn(5)
    options = {"symmetric": True, "per_channel": True}
    plain = fake_quantize_weight(weight, None, None, None, Grid(4, True), **options)
    scaled = fake_quantize_weight(weight, logs, None, None, Grid(4, True), **options)
    assert torch.allclose(scaled, plain * logs.exp()[:, None], rtol=1e-5)


def test_gradient_of_the_straight_through_rounding_is_one():
    x = torch.tensor([0.2, 0.5, 1.7, -2.5], requires_grad=True)
    out = round_straight_through(x)
    out.sum().backward()
    assert out.tolist() == [0.0, 0.0, 2.0, -2.0]
    assert x.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize("zero", [0, -3])
def test_gradients_of_learned_rounding(zero):
    grid = Grid(4, True)
    base, scale = torch.randn(5, 40) * 6, torch.rand(5, 1) + 0.1
    zero_point = torch.full((5, 1), zero, dtype=torch.int32)
    offset = (torch.rand(5, 40) - 0.5).requires_grad_()
    gain = (torch.randn(5, 1) * 0.05).requires_grad_()
    upstream = torch.randn(5, 40)
    ours_out = fake_quantize_offset(base, scale, zero_point, offset, gain, grid)
    ours = torch.autograd.grad(ours_out, (offset, gain), upstream)
    place = base + offset
    codes = (place + (place.round() - place).detach() + zero).clamp(grid.qmin, grid.qmax)
    theirs_out = (codes - zero) * scale * gain.exp()
    theirs = torch.autograd.grad(theirs_out, (offset, gain), upstream)
    assert torch.allclose(ours_out, theirs_out, rtol=1e-6)
    for mine, expected in zip(ours, theirs, strict=True):
        close(mine, expected)
