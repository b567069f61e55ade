"""Attention as one node against the plain form: values, gradients, memory."""

import gc

import pytest
import torch

from optimum_mobilequant.nn import tuned_attention
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


HIDDEN = torch.finfo(torch.float32).min


def causal(batch):
    mask = torch.full((LENGTH, LENGTH), HIDDEN).triu(1)[None, None]
    return mask if batch == 1 else mask.repeat(batch, 1, 1, 1)


def padded(batch):
    """Causal, the first places of the second sequence padding: their rows see nothing."""
    mask = causal(batch)
    mask[1:, :, :, :5] = HIDDEN
    return mask


def window(batch):
    """Causal, of the last three positions."""
    return causal(batch).masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3), HIDDEN)


MASKS = {
    "no mask": lambda: None,
    "one for all": lambda: causal(1),
    "one each": lambda: causal(2),
    "padding": lambda: padded(2),
    "window": lambda: window(1),
}


def plain(query, key, value, mask, scaling, scores, probabilities):
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    s = fake_quantize_open(query @ key.transpose(2, 3) * scaling, scores.scale, scores.zero_point, scores.grid)
    p = torch.softmax(s if mask is None else s + mask, dim=-1)
    p = fake_quantize_open(p, probabilities.scale, probabilities.zero_point, probabilities.grid)
    return p @ value


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("block", [128, 4, 1])
def test_values_and_gradients(heads, kv_heads, masked, block, monkeypatch):
    monkeypatch.setattr(tuned_attention, "_BLOCK", block)
    mask = MASKS[masked]()
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
    assert sum(sizes) == sum(leaf.numel() for leaf in leaves)


def test_blocks_of_a_mask_end_with_it():
    before, mask, leaves = len(tuned_attention._planes_of), causal(2), operands(4, 2)
    out = [attend(*leaves, mask, 8**-0.5, SCORES, PROBABILITIES) for _ in range(2)]  # two layers, one mask
    assert len(tuned_attention._planes_of) == before + 1
    del mask
    gc.collect()
    assert len(tuned_attention._planes_of) == before
    sum(out).sum().backward()  # they keep what they need


def test_hidden_keys_are_left_out(monkeypatch):
    monkeypatch.setattr(tuned_attention, "_BLOCK", 4)

    def spans(mask):
        return [(b.keys.start, b.keys.stop) for b in tuned_attention._planes(mask[:, 0])[0]]

    assert spans(causal(1)) == [(0, 4), (0, 8), (0, 9)]
    assert spans(window(1)) == [(0, 4), (2, 8), (6, 9)]
    # Rows of padding give all keys the same probability; so does the plain form.
    assert spans(padded(2)) == [(None, None), (None, None), (0, 9)]


def test_inside_recomputing():
    found = []
    for context in (torch.enable_grad(), recomputing()):
        leaves = operands(4, 2)
        with context:
            loss = attend(*leaves, causal(2), 8**-0.5, SCORES, PROBABILITIES).square().sum()
        loss.backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
