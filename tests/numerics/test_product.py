"""The float32 product of tuning against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from optimum_mobilequant.numerics import product as module
from optimum_mobilequant.numerics.product import product

onednn = pytest.mark.skipif(not module._onednn_is_faster(), reason="this processor uses torch's own product")


def operands(kind):
    x, weight = torch.randn(3, 7, 24), torch.randn(10, 24)
    if kind == "transposed":
        weight = torch.randn(24, 10).t()
    elif kind == "one row":
        x = torch.randn(1, 1, 24)
    return x.double(), weight.double(), torch.randn(10).double()


def sliced(t):
    """The same values, neither a matrix nor its transpose: oneDNN's slow loop must not see them."""
    return torch.stack([t, t], dim=-2).select(-2, 0) if t.ndim > 1 else t


@pytest.mark.parametrize("kind", ["plain", "transposed", "slices", "one row"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients(kind, with_bias):
    exact = [t.detach().requires_grad_() for t in operands(kind)]
    change = sliced if kind == "slices" else torch.clone
    single = [change(t.detach().float()).requires_grad_() for t in exact]
    pairs = []
    for multiply, (x, weight, bias) in ((F.linear, exact), (product, single)):
        out = multiply(x, weight, bias if with_bias else None)
        out.square().sum().backward()
        pairs.append([out, x.grad, weight.grad] + ([bias.grad] if with_bias else []))
    for expected, found in zip(*pairs, strict=True):
        assert found.dtype == torch.float32
        assert float((found - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.bfloat16, (4, 24)), (torch.float64, (4, 24)), (torch.float32, (0, 24))]
)
def test_what_it_is_not_made_for_is_left_to_torch(dtype, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(10, 24).to(dtype)
    assert torch.equal(product(x, weight), F.linear(x, weight))


@onednn
def test_two_calls_give_the_same_bits():
    x, weight = torch.randn(300, 64), torch.randn(50, 64)
    assert torch.equal(product(x, weight), product(x.clone(), weight.clone()))


@onednn
def test_only_dense_operands_reach_onednn(monkeypatch):
    seen = []
    dense = module._dense
    monkeypatch.setattr(module, "_dense", lambda t: seen.append(dense(t)) or seen[-1])
    x, weight, _ = (sliced(t.float()) for t in operands("plain"))
    product(x.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert len(seen) == 6
    assert all(t.is_contiguous() or t.t().is_contiguous() for t in seen)
    assert not weight.is_contiguous(), "the operand of this test should be one that needs a copy"
