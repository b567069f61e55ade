"""Who gets more bits: never above the budget, never fewer bits for more budget, as good as an exhaustive search."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_mobilequant.allocate import Unit, allocate, parse_budget, smallest
from optimum_mobilequant.allocate.solve import total


def units_and_losses(sizes, scales, choices):
    units = [Unit(f"u{i}", (f"u{i}",), n, {b: n * b + 7 for b in choices}) for i, n in enumerate(sizes)]
    losses = {unit.name: {b: scale * 4.0**-b for b in choices} for unit, scale in zip(units, scales, strict=True)}
    return units, losses


problems = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 50), min_size=n, max_size=n), st.lists(st.floats(0, 10), min_size=n, max_size=n)
    )
)


@settings(max_examples=80, deadline=None)
@given(problems, st.sampled_from([(4, 8), (3, 4, 8), (3, 4, 8, 16)]), st.sampled_from(["bits", "bytes"]))
def test_a_larger_budget_is_kept_and_never_lowers_a_layer(problem, choices, kind):
    units, losses = units_and_losses(*problem, choices)
    least, most = smallest(units, choices, kind), total(units, {u.name: max(choices) for u in units}, kind)
    before = None
    for limit in [least + (most - least) * step / 7 for step in range(8)]:
        chosen = allocate(units, losses, choices, limit, kind)
        assert total(units, chosen, kind) <= limit
        assert set(chosen.values()) <= set(choices)
        if before is not None:
            assert all(chosen[name] >= before[name] for name in chosen)
        before = chosen
    assert all(before[u.name] == max(choices) for u in units if losses[u.name][4] > 0)


@settings(max_examples=40, deadline=None)
@given(problems)
def test_no_other_choice_of_the_same_cost_is_better(problem):
    """On the hull the greedy choice is the best of all that cost no more than it does."""
    choices = (3, 4, 8)
    units, losses = units_and_losses(*problem, choices)
    limit = smallest(units, choices, "bits") * 1.6
    chosen = allocate(units, losses, choices, limit, "bits")
    found, spent = sum(losses[n][b] for n, b in chosen.items()), total(units, chosen, "bits")
    for bits in itertools.product(choices, repeat=len(units)):
        other = {unit.name: b for unit, b in zip(units, bits, strict=True)}
        if total(units, other, "bits") <= spent:
            assert found <= sum(losses[n][b] for n, b in other.items()) + 1e-12


def test_equal_losses_are_decided_by_the_order_of_the_network():
    units, losses = units_and_losses([10, 10, 10], [1, 1, 1], (4, 8))
    assert allocate(units, losses, (4, 8), 160, "bits") == {"u0": 8, "u1": 4, "u2": 4}


def test_bits_that_save_no_loss_are_not_bought():
    units = [Unit("u", ("u",), 10, {4: 40, 8: 80})]
    assert allocate(units, {"u": {4: 1.0, 8: 2.0}}, (4, 8), 1000, "bytes") == {"u": 4}


def test_the_fewest_bits_must_fit():
    units, losses = units_and_losses([10], [1], (4, 8))
    with pytest.raises(ValueError, match="smallest cost 40"):
        allocate(units, losses, (4, 8), 39, "bits")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("auto:1.2GB", "bytes", 1.2e9),
        ("auto:900MB", "bytes", 9e8),
        ("auto:1 GiB", "bytes", 2**30),
        ("auto:123456B", "bytes", 123456),
        ("auto:4.5", "bits", 4.5),
        ("auto:device", "device", 0),
    ],
)
def test_budgets_are_read(text, kind, value):
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, value)


@pytest.mark.parametrize("text", ["4.5", "auto:", "auto:0", "auto:-1GB", "auto:4.5TB", "auto:1,2GB", "auto:devices"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match='"auto:1.2GB"'):
        parse_budget(text)
