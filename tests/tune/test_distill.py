"""The distillation losses against hand computations."""

import math

import pytest
import torch
from torch.nn import functional as F

from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.tune import build_student
from optimum_mobilequant.tune.distill import (
    Terms,
    alignment_loss,
    entropy_loss,
    important_tokens,
    make_distillation,
    make_feature_loss,
)
from optimum_mobilequant.tune.objective import make_objective
from tests.tiny import build, plan_of, probe_ids


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=probe_ids(), use_cache=False).logits


def kl(p_logits, q_logits, temperature=1.0):
    p, q = (F.log_softmax(x / temperature, dim=-1).double() for x in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean()) * temperature**2


@pytest.fixture(scope="module")
def models():
    """A model, two others of its vocabulary, and the first with larger weights in place of a student."""
    model, other, third = (build("llama-gqa", seed=seed) for seed in (0, 1, 2))
    return model, plan_of(model), [other, third]


def student_of(model, plan, factor=1.1):
    """The quantized modules, switched off, with scaled queries: differs from the model, and has no rounding."""
    changed = build("llama-gqa")
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)
    student = build_student(changed, plan)
    set_mode(student, Mode.OFF)
    return student


def test_one_teacher_is_the_single_teacher_objective_exactly(models):
    model, plan, _ = models
    student = student_of(model, plan)
    expected = make_objective("logits_kl", plan, top_k=8)(student, model, probe_ids())
    for weight in (1.0, 0.25):
        assert torch.equal(
            make_distillation(model, plan, [(model, weight)], Terms(), top_k=8)(student, probe_ids()), expected
        )


def test_several_teachers_temperature_and_cross_entropy_by_hand(models):
    model, plan, others = models
    student = student_of(model, plan)
    logits = logits_of(student)
    teachers = [(model, 2.0), (others[0], 1.0), (others[1], 1.0)]
    found = make_distillation(model, plan, teachers, Terms(cross_entropy=0.3, temperature=2.0), top_k=96)
    divergence = sum(w / 4 * kl(logits_of(t), logits, 2.0) for t, w in teachers)
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1), probe_ids()[:, 1:].flatten())
    assert float(found(student, probe_ids())) == pytest.approx(0.7 * divergence + 0.3 * float(text), rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss(models):
    model, plan, _ = models
    student = student_of(model, plan, factor=1.0)
    terms = Terms(alignment=1.0)
    loss = make_distillation(model, plan, [(model, 1.0)], terms, top_k=96)(student, probe_ids())
    assert abs(float(loss)) < 1e-5
    assert float(make_feature_loss(model, plan)(student, probe_ids())) < 1e-10
    other = student_of(model, plan, factor=2.0)  # the control
    assert float(make_distillation(model, plan, [(model, 1.0)], terms, top_k=96)(other, probe_ids())) > 1e-3


def test_entropy_by_hand_and_its_sign():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)

    def by_hand(pairs):
        total = 0.0
        for pair in pairs:
            for x in pair:
                variance = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1)
                total += float(torch.log(1 + variance).mean())
        return -0.5 * math.log(total / len(pairs) + 1e-6)

    pairs = [(q, k), (2 * q, k)]
    assert float(entropy_loss(pairs)) == pytest.approx(by_hand(pairs), rel=1e-5)
    falling = [float(entropy_loss([(c * q, c * k)])) for c in (0.5, 1.0, 2.0, 4.0)]
    assert falling == sorted(falling, reverse=True)


def test_entropy_where_nothing_varies_is_finite():
    q = torch.zeros(1, 1, 3, 4, requires_grad=True)
    loss = entropy_loss([(q, q)])
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(q.grad).all()


def test_alignment_by_hand_and_its_sign():
    torch.manual_seed(0)
    t = torch.randn(1, 2, 3, 3)
    s = torch.randn(1, 2, 3, 3)
    lower = [(i, j) for i in range(3) for j in range(i + 1)]
    cosines = []
    for head in range(2):
        a, b = (torch.tensor([x[0, head, i, j] for i, j in lower]) for x in (s, t))
        cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert float(alignment_loss([s], [t])) == pytest.approx(1 - sum(cosines) / 2, abs=1e-6)
    falling = [float(alignment_loss([(1 - c) * s + c * t], [t])) for c in (0.0, 0.3, 0.6, 1.0)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0, abs=1e-6)
    assert float(alignment_loss([-t], [t])) == pytest.approx(2, abs=1e-6)


def test_alignment_does_not_look_at_hidden_positions():
    torch.manual_seed(0)
    t = torch.randn(1, 2, 4, 4)
    assert float(alignment_loss([t + 100 * torch.ones(4, 4).triu(1)], [t])) == pytest.approx(0, abs=1e-6)
    t = torch.randn(1, 2, 4, 6)  # behind a prefix of two tokens
    assert float(alignment_loss([t + 100 * torch.ones(4, 6).triu(3)], [t])) == pytest.approx(0, abs=1e-6)
    assert float(alignment_loss([t + 100 * torch.ones(4, 6).triu(2)], [t])) > 0.1


def test_important_tokens_by_hand():
    first = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 0.0, 0.0]]])  # [batch, heads, length]
    scores = torch.zeros(1, 2, 4, 4)
    scores[:, :, :, 0] = first
    assert important_tokens([scores], 0.5).tolist() == [[True, True, False, False]]  # sums 3, 6, 2, 0
    assert important_tokens([scores], 1.0).all()
    assert important_tokens([scores], 1e-3).sum() == 1
    both = [scores, 9 * scores.flip(2)]  # sums 3, 24, 56, 27
    assert important_tokens(both, 0.5).tolist() == [[False, False, True, True]]


def test_token_share_takes_the_divergence_at_the_important_positions(models):
    model, plan, _ = models
    student = student_of(model, plan)
    teachers = [(model, 1.0)]
    full, half = (
        make_distillation(model, plan, teachers, Terms(token_share=share), top_k=96)(student, probe_ids())
        for share in (1.0, 0.5)
    )
    assert torch.equal(full, make_distillation(model, plan, teachers, Terms(), top_k=96)(student, probe_ids()))
    # The scores of the float model, from its own projections.
    ids = probe_ids()
    seen = []
    eager = build("llama-gqa")
    for layer in eager.model.layers:
        attention = layer.self_attn

        def keep(module, args, kwargs):
            hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

            shape = (*hidden.shape[:2], -1, module.head_dim)
            q, k = (p(hidden).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            k = repeat_kv(k, module.num_key_value_groups)
            seen.append((q @ k.transpose(2, 3) * module.scaling)[:, :, :, 0].sum(1))

        attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        target = eager(input_ids=ids, use_cache=False).logits
    chosen = sum(seen).topk(ids.shape[1] // 2, dim=1).indices
    rows = torch.arange(len(ids))[:, None]
    assert float(half) == pytest.approx(kl(target[rows, chosen], logits_of(student)[rows, chosen]), rel=1e-4)
    assert float(half) != pytest.approx(float(full), rel=1e-3)


def test_features_by_hand(models):
    model, plan, _ = models
    student = student_of(model, plan)

    def hidden(net):
        seen = []
        hooks = [layer.register_forward_hook(lambda _, a, out: seen.append(out)) for layer in net.model.layers]
        logits_of(net)
        [hook.remove() for hook in hooks]
        return seen

    pairs = list(zip(hidden(student), hidden(model), strict=True))
    expected = sum(float((s - t).square().mean() / t.square().mean()) for s, t in pairs) / len(pairs)
    assert float(make_feature_loss(model, plan)(student, probe_ids())) == pytest.approx(expected, rel=1e-5)


def test_regularisers_enter_with_their_weights(models):
    model, plan, _ = models
    student = student_of(model, plan)

    def loss(**terms):
        return float(make_distillation(model, plan, [(model, 1.0)], Terms(**terms), top_k=96)(student, probe_ids()))

    plain, aligned, entropic = loss(), loss(alignment=1.0), loss(entropy=1.0)
    both = loss(alignment=2.0, entropy=0.5)
    assert aligned > plain
    assert both == pytest.approx(plain + 2 * (aligned - plain) + 0.5 * (entropic - plain), rel=1e-4)
