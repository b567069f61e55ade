"""Targets of the teacher: computed once for each sequence, the same bits in any order."""

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.tune import Learnables, build_student
from optimum_mobilequant.tune.objective import make_objective
from optimum_mobilequant.tune.targets import Targets
from tests.tiny import build, config, plan_of, token_ids

ROWS = torch.tensor(token_ids(12))


@pytest.fixture
def teacher():
    return build("llama-gqa").eval()


def counted(teacher, path="model.layers.0"):
    calls = []
    teacher.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_every_batch_is_computed_once(teacher):
    calls = counted(teacher)
    targets = Targets("lm_head", [ROWS[:8], ROWS[8:]], batch_size=4)
    for order in ([0, 5, 11], [3, 2, 1, 0], [8, 9, 10, 11]):
        targets(teacher, ROWS[order])
    assert len(calls) == 3


def test_the_order_of_requests_changes_no_bit(teacher):
    first, second = (Targets("lm_head", [ROWS], batch_size=4) for _ in range(2))
    there = first(teacher, ROWS)
    back = second(teacher, ROWS.flip(0)).flip(0)
    assert torch.equal(there, back)
    assert not torch.equal(there[0], there[1])


def test_an_unknown_sequence_is_computed_each_time(teacher):
    calls = counted(teacher)
    targets = Targets("lm_head", [ROWS[:4]], batch_size=4)
    for _ in range(3):
        targets(teacher, ROWS[3:6])
    assert len(calls) == 3
    known = Targets("lm_head", [ROWS], batch_size=4)
    assert torch.allclose(targets(teacher, ROWS[3:6]), known(teacher, ROWS[3:6]), atol=1e-6)


def test_the_forward_pass_ends_where_the_target_is(teacher):
    calls = counted(teacher, "lm_head")
    targets = Targets("model.norm", [ROWS], batch_size=4)
    targets(teacher, ROWS)
    assert not calls


@pytest.mark.parametrize("name", ["logits_kl", "hidden_mse"])
@pytest.mark.parametrize("top_k", [16, 1024])
def test_kept_targets_give_the_same_loss(teacher, name, top_k):
    plan = plan_of(teacher)
    student = build_student(teacher, plan)
    Learnables(student, plan, [], {}).bind(student)
    for module in student.modules():
        if hasattr(module, "zero_point") and hasattr(module, "spec") and module.spec.fixed is None:
            module.set(torch.tensor(0.05), torch.tensor(100))
    losses = [
        make_objective(name, plan, top_k=top_k, rows=rows, batch_size=4)(student, teacher, ROWS[2:6])
        for rows in ([], [ROWS])
    ]
    assert float(losses[0]) > 0
    assert torch.allclose(*losses, rtol=1e-5)


def test_hidden_states_beside_the_divergence(teacher):
    """Trained is on the sum of the two, validated the divergence; the float model's own hidden states cost nothing."""
    plan = plan_of(teacher)

    def loss(student, **options):
        return make_objective("logits_kl", plan, top_k=96, **options)(student, teacher, ROWS[:4])

    student = build("llama-gqa", seed=1).eval()
    seen = []
    for model in (student, teacher):
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(input_ids=ROWS[:4])
        hook.remove()
    error = (seen[0] - seen[1]).square().mean() / seen[1].square().mean()
    assert error > 0.1
    torch.testing.assert_close(loss(student, hidden_weight=0.5), loss(student) + 0.5 * error)
    assert loss(teacher, hidden_weight=0.5) == loss(teacher) < 1e-6
    with torch.no_grad():
        assert loss(student, hidden_weight=0.5) == loss(student)


@pytest.mark.parametrize(("steps", "passes"), [(12, "once"), (1, "each time")])
def test_a_run_keeps_what_it_reads_again(steps, passes, monkeypatch):
    made = []
    init = Targets.__init__
    monkeypatch.setattr(
        Targets, "__init__", lambda self, place, rows=(), **k: made.append(list(rows)) or init(self, place, rows, **k)
    )
    quantize(build("llama-gqa"), None, config("w4a8", recipe="mobilequant", steps=steps))
    assert len(made[0]) == (2 if passes == "once" else 1), "validation text always, training text if read again"


def test_no_memory_keeps_nothing(monkeypatch):
    made = []
    init = Targets.__init__
    monkeypatch.setattr("optimum_mobilequant.run.prepare.available_memory", lambda device: 1000)
    monkeypatch.setattr(
        Targets, "__init__", lambda self, place, rows=(), **k: made.append(list(rows)) or init(self, place, rows, **k)
    )
    quantize(build("llama-gqa"), None, config("w4a8", recipe="mobilequant", steps=4))
    assert made[0] == []
