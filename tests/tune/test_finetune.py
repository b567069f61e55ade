"""What fine-tuning may move, and by which gradients."""

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.nn.tunable import LowRank, TunableWeight
from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.plan import WeightRule, WeightSpec
from optimum_mobilequant.tune import Finetune, Learnables, Rounding, build_student
from tests.tiny import build, config, plan_of, probe_ids, token_ids

RATES = {"adapters": 1e-3, "offsets": 1e-2, "gains": 1e-3, "norms": 1e-3, "biases": 1e-3, "ranges": 1e-3}


def weight_of(rows=6, columns=10, bits=4):
    torch.manual_seed(0)
    rule = WeightRule(bits, True, "channel")
    return TunableWeight(torch.randn(rows, columns), WeightSpec("x", "up", rule))


def student_of(variant="llama-bias", rank=None, **changes):
    model = build(variant, **changes)
    plan = plan_of(model, "w4a8")
    student = build_student(model, plan)
    learnables = Learnables(student, plan, [], {})
    start = {n: (torch.tensor(-4.0), torch.tensor(4.0)) for n, s in plan.activations.items() if s.fixed is None}
    learnables.set_ranges(student, start, learn=True)
    return model, student, learnables, Finetune(student, learnables, rank=rank)


def test_frozen_integers_pass_the_gradient_to_the_row_gain_alone():
    weight = weight_of()
    codes, scale, _ = weight.codes()
    weight.freeze(codes=True)
    weight.gain_log = torch.nn.Parameter(torch.full((6, 1), 0.05))
    grad = torch.randn(6, 10)
    out = weight()
    out.backward(grad)
    expected = codes.float() * scale * torch.exp(torch.tensor(0.05))
    assert torch.allclose(out, expected)
    assert torch.allclose(weight.gain_log.grad, (grad * expected).sum(1, keepdim=True))
    after = weight.codes()
    assert torch.equal(after[0], codes)
    assert torch.allclose(after[1], scale * torch.exp(torch.tensor(0.05)))


def test_low_rank_offset_inside_the_rounding_in_closed_form():
    weight = weight_of()
    scale = weight.codes()[1]
    base = weight.source / scale
    weight.freeze()
    left, right = torch.nn.Parameter(torch.randn(6, 2)), torch.nn.Parameter(torch.randn(2, 10))
    weight.low_rank = LowRank(left, right, 0.5)
    weight.gain_log = torch.nn.Parameter(torch.zeros(6, 1))
    place = base + 0.5 * left.detach() @ right.detach()
    assert torch.equal(weight.codes()[0].float(), place.round().clamp(-8, 7))
    grad = torch.randn(6, 10)
    weight().backward(grad)
    through = grad * scale * ((place > -8.5) & (place < 7.5))
    assert not bool(((place > -8.5) & (place < 7.5)).all()), "some codes should be clipped"
    assert torch.allclose(left.grad, 0.5 * through @ right.detach().T, atol=1e-6)
    assert torch.allclose(right.grad, 0.5 * left.detach().T @ through, atol=1e-6)


def test_freezing_again_keeps_codes_and_scale_that_rounding_learned():
    weight = weight_of()
    weight.freeze()
    weight.offset_steps = torch.nn.Parameter(torch.rand(6, 10) - 0.5)
    weight.gain_log = torch.nn.Parameter(0.1 * torch.randn(6, 1))
    codes, scale, _ = weight.codes()
    for option in (False, True):
        weight.freeze(codes=option)
        assert torch.equal(weight.codes()[0], codes)
        assert torch.equal(weight.codes()[1], scale)
        assert weight.offset_steps is None and weight.gain_log is None
    assert torch.allclose(weight(), codes.float() * scale)


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_nothing_changes_before_the_first_step(rank):
    ids = probe_ids()
    for variant in ("llama-bias", "qwen3", "gemma", "stablelm"):
        model = build(variant)
        plan = plan_of(model, "w4a8")
        student = build_student(model, plan)
        learnables = Learnables(student, plan, [], {})
        start = {n: (torch.tensor(-4.0), torch.tensor(4.0)) for n, s in plan.activations.items() if s.fixed is None}
        learnables.set_ranges(student, start, learn=True)
        learnables.release(student)
        with torch.no_grad():
            before = student(input_ids=ids, use_cache=False).logits
            tuned = Finetune(student, learnables, rank=rank)
            tuned.release(student)
            assert torch.equal(student(input_ids=ids, use_cache=False).logits, before), variant


@pytest.mark.parametrize("rank", [None, 0, 3])
@pytest.mark.parametrize("variant", ["llama-bias", "stablelm"])
def test_gradients_reach_every_learned_parameter_and_no_other(rank, variant):
    model, student, _, tuned = student_of(variant, rank)
    groups = {g["name"]: g["params"] for g in tuned.groups(RATES)}
    assert set(groups) == {"gains", "norms", "biases", "ranges"} | {None: set(), 0: {"offsets"}, 3: {"adapters"}}[rank]
    tuned.bind(student)
    with torch.enable_grad():
        student(input_ids=probe_ids(), use_cache=False).logits.square().mean().backward()
    learned = {id(p) for group in groups.values() for p in group}
    for name, part in groups.items():
        # The right factors start behind left ones of zero.
        moved = [float(p.grad.abs().sum()) for p in part if name != "adapters" or p.shape[1] == rank]
        assert moved and all(value > 0 for value in moved), name
    others = [*model.parameters(), *(p for p in student.parameters() if id(p) not in learned)]
    assert all(p.grad is None for p in others)


def test_a_group_without_a_rate_stays_as_it_is():
    _, _, _, tuned = student_of(rank=2)
    groups = tuned.groups({**RATES, "norms": 0.0})
    assert "norms" not in {g["name"] for g in groups}
    assert not any(p.requires_grad for p in tuned.norms.values())


def test_factors_stay_within_their_bounds():
    _, _, _, tuned = student_of()
    with torch.no_grad():
        for p in [*tuned.gains.values(), *tuned.norms.values()]:
            p.fill_(9.0)
    tuned.clamp()
    assert max(float(p.detach().max()) for p in tuned.gains.values()) == pytest.approx(0.1)
    assert max(float(p.detach().max()) for p in tuned.norms.values()) == pytest.approx(0.5)


def matrices(model):
    return {
        name: (module.codes.to(torch.int32), module.scale.clone())
        for name, module in model.named_modules()
        if type(module).__name__ == "QWeight" and len(module.shape) == 2
    }


def run(variant="llama-bias", **options):
    shared = {"recipe": "rtn", "effort": "light", "dataset": token_ids(160), "samples": 64, "batch_size": 16}
    return quantize(build(variant), None, config("w4a8", **{**shared, "steps": None, **options}))


@pytest.mark.parametrize("rounding", ["nearest", "learned"])
def test_scales_leaves_every_integer_of_a_matrix_alone_and_lowers_the_loss(rounding):
    more = {"rounding": rounding} | ({"rounding_steps": 10} if rounding == "learned" else {})
    before, after = run(**more), run(**more, finetune="scales", finetune_steps=40)
    old, new = matrices(before), matrices(after)
    assert all(torch.equal(old[name][0], new[name][0]) for name in old)
    changed = [name for name in old if not torch.equal(old[name][1], new[name][1])]
    assert changed and not {"lm_head.weight", "model.embed_tokens.weight"} & set(changed)
    record = after.config.quantization_config.recorded["finetune"]
    assert record["best"] < record["start"]
    assert before.config.quantization_config.recorded["finetune"] is None
    assert any(not torch.equal(p, after.state_dict()[n]) for n, p in before.state_dict().items() if n.endswith("bias"))


@pytest.mark.parametrize("moved", [{"lr_offsets": 5e-2}, {"adapter_rank": 4, "lr_adapters": 3e-2}])
def test_qad_moves_integers_and_lowers_the_loss(moved):
    before = run()
    qad = run(finetune="qad", finetune_steps=30, finetune_dataset="calibration", **moved)
    old, new = matrices(before), matrices(qad)
    assert sum(int((old[name][0] != new[name][0]).sum()) for name in old) > 0
    assert all(torch.equal(old[n][0], new[n][0]) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    record = qad.config.quantization_config.recorded["finetune"]
    assert record["best"] < record["start"]


def test_rounding_then_finetuning_starts_where_rounding_ended():
    model, student, learnables, _ = student_of(rank=None)
    rounding = Rounding(student, learnables)
    with torch.no_grad():
        for offset in rounding.offsets.values():
            offset.uniform_(-0.5, 0.5)
        rounding.release(student)
        before = student(input_ids=probe_ids(), use_cache=False).logits
        Finetune(student, learnables, rank=4).release(student)
        set_mode(student, Mode.QUANTIZE)
        assert torch.equal(student(input_ids=probe_ids(), use_cache=False).logits, before)


def test_grid_of_a_frozen_weight_is_that_of_its_spec():
    weight = weight_of(bits=8)
    weight.freeze(codes=True)
    assert weight.codes()[0].dtype == Grid(8, signed=True).dtype


def test_rank_0_moves_single_weights_by_whole_steps():
    _, _, learnables, tuned = student_of(rank=0)
    name, weight = learnables.projections()[0]
    before = weight.codes()[0].clone()
    with torch.no_grad():
        tuned.offsets[name.replace(".", "/")][0, :2] = torch.tensor([0.4, -0.6])
    moved = (weight.codes()[0] - before).to(torch.int32)
    assert int(moved[0, 1]) == (-1 if int(before[0, 1]) > -8 else 0)
    moved[0, 1] = 0
    assert not moved.any()
