"""Tensors that the backward pass makes again: same bits, less memory, and no use of stale values."""

import pytest
import torch
from torch.nn import functional as F

from optimum_mobilequant.numerics import (
    Grid,
    fake_quantize_learned,
    fake_quantize_open,
    fake_quantize_weight,
    recompute,
)
from optimum_mobilequant.numerics.recompute import follows_from, recomputing

GRID = Grid(8, signed=False)


def parameters():
    torch.manual_seed(0)
    return {
        "x": torch.randn(4, 6, 16).requires_grad_(),
        "scale": torch.tensor(0.03, requires_grad=True),
        "zero_point": torch.tensor(120.0, requires_grad=True),
        "weight_log": torch.zeros(12, requires_grad=True),
    }


def network(x, scale, zero_point, weight_log):
    """Rounded tensors that are read by several operations, as views, transposed, and rounded again."""
    weight = fake_quantize_weight(
        torch.randn(12, 16, generator=torch.Generator().manual_seed(1)), weight_log, None, None,
        Grid(4, signed=True), symmetric=True, per_channel=True,
    )  # fmt: skip
    x = fake_quantize_learned(x * 1.0, scale, zero_point, GRID)
    y = F.silu(x @ weight.t()) * F.linear(x.transpose(0, 1), weight).transpose(0, 1)
    p = fake_quantize_open(torch.softmax(y, -1), torch.tensor(1 / 255), torch.tensor(0), GRID)
    return (
        fake_quantize_learned(torch.matmul(p, x[..., :12].transpose(1, 2)), scale * 0.1, zero_point, GRID)
        .square()
        .sum()
    )


def gradients(context):
    leaves = parameters()
    with context:
        loss = network(**leaves)
    loss.backward()
    return [loss.detach()] + [leaf.grad for leaf in leaves.values()]


def kept_bytes(context_of):
    """Bytes that the graph keeps, each storage once."""
    storages = {}
    keep = recompute._keep

    def count(tensor):
        kept = keep(tensor)
        if isinstance(kept, recompute._Kept):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return kept if context_of == "recomputing" else recompute._Kept(tensor, tensor._version)

    def count_all(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = (count, recompute._Maker()) if context_of == "recomputing" else (count_all, lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        loss = network(**parameters())
    loss.backward()
    return sum(storages.values())


def test_gradients_are_the_same_bits():
    plain = gradients(torch.enable_grad())
    again = gradients(recomputing())
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert all(float(g.abs().max()) > 0 for g in again)


def test_less_is_kept():
    assert kept_bytes("recomputing") < 0.7 * kept_bytes("plain")


def test_a_tensor_that_was_written_to_is_kept_as_it_is():
    x = torch.randn(5, requires_grad=True)
    with recomputing():
        out = follows_from(torch.ones(5), torch.ones_like, torch.zeros(5))
        out.mul_(3.0)
        (x * out).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0)), "what its origin makes is no longer its value"


def test_an_origin_that_was_written_to_is_an_error():
    x, source = torch.randn(5, requires_grad=True), torch.ones(5)
    with recomputing():
        out = follows_from(source * 2, lambda t: t * 2, source)
        loss = (x * out).sum()
    source.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_the_value_in_use_is_the_one_that_was_made_again():
    """Control: with an origin that makes something else, the gradient shows it."""
    x = torch.randn(5, requires_grad=True)
    with recomputing():
        out = follows_from(torch.ones(5), lambda t: t + 7, torch.zeros(5))
        (x * out).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 7.0))
