"""Attention as one node against the plain form: values, gradients, memory."""

import pytest
import torch

from optimum_mobilequant.nn.tuned_attention import Encoding, attend
from optimum_mobilequant.numerics import Grid, fake_quantize_open
from optimum_mobilequant.numerics.recompute import recomputing

SCORES = Encoding(torch.tensor(0.01), torch.tensor(40000, dtype=torch.int32), Grid(16, signed=False))
PROBABILITIES = Encoding(torch.tensor(1 / 255), torch.tensor(0, dtype=torch.int32), Grid(8, signed=False))
LENGTH = 9


def operands(heads, kv_heads, batch=2):
    torch.manual_seed(3)
    shapes = [(batch, n, LENGTH, 8) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def causal(batch):
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    return mask if batch == 1 else mask.repeat(batch, 1, 1, 1)


def plain(query, key, value, mask, scaling, scores, probabilities):
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    s = fake_quantize_open(query @ key.transpose(2, 3) * scaling, scores.scale, scores.zero_point, scores.grid)
    p = torch.softmax(s if mask is None else s + mask, dim=-1)
    p = fake_quantize_open(p, probabilities.scale, probabilities.zero_point, probabilities.grid)
    return p @ value


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("masked", ["no mask", "one for all", "one each"])
def test_values_and_gradients(heads, kv_heads, masked):
    mask = {"no mask": None, "one for all": causal(1), "one each": causal(2)}[masked]
    found = []
    for function in (plain, attend):
        leaves = operands(heads, kv_heads)
        out = function(*leaves, mask, 8**-0.5, SCORES, PROBABILITIES)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        # A score that falls on the other side of a rounding step moves the context by less than a step.
        assert float((ours - theirs).abs().max()) <= 2e-3 * float(theirs.abs().max())


def test_rounding_is_seen():
    """Control: another grid of the probabilities changes the result by more than the bound above."""
    coarse = Encoding(torch.tensor(1 / 15), torch.tensor(0, dtype=torch.int32), Grid(4, signed=False))
    first, second = (attend(*operands(4, 2), causal(2), 8**-0.5, SCORES, p) for p in (PROBABILITIES, coarse))
    assert float((first - second).abs().max()) > 1e-2 * float(first.abs().max())


def test_nothing_of_the_size_of_the_scores_is_kept():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        leaves = operands(4, 2)
        attend(*leaves, causal(1), 8**-0.5, SCORES, PROBABILITIES)
    assert sum(sizes) == sum(leaf.numel() for leaf in leaves) + LENGTH**2


def test_inside_recomputing():
    found = []
    for context in (torch.enable_grad(), recomputing()):
        leaves = operands(4, 2)
        with context:
            loss = attend(*leaves, causal(2), 8**-0.5, SCORES, PROBABILITIES).square().sum()
        loss.backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
