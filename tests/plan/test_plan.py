"""The plan names every tensor of the graph exactly once, and overrides change what they say and nothing else."""

import json
from dataclasses import replace

import pytest

from optimum_mobilequant.checkpoint.pack import input_of
from optimum_mobilequant.nn import QuantEmbedding, QuantLinear, QuantNorm, quantizers_of
from optimum_mobilequant.plan import PRESETS, Scheme
from optimum_mobilequant.plan.presets import BASE_ACTIVATIONS
from optimum_mobilequant.tune import build_student
from tests.tiny import VARIANTS, build, plan_of

OWNERS = (QuantLinear, QuantNorm, QuantEmbedding)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_quantizer_of_the_model_is_an_entry_of_the_plan(model, preset):
    plan = plan_of(model, preset)
    student = build_student(model, plan)
    named = {name: module for name, module in student.named_modules() if module in set(quantizers_of(student))}
    assert named.keys() == plan.activations.keys()
    for name, quantizer in named.items():
        assert quantizer.spec is plan.activations[name]
        assert quantizer.spec.name == name
        assert quantizer.spec.bits == PRESETS[preset].activations[quantizer.spec.role]
    owners = {name for name, module in student.named_modules() if isinstance(module, OWNERS)}
    assert owners == plan.weights.keys()


def test_every_module_with_weights_reads_a_planned_activation(model):
    plan = plan_of(model)
    for name, spec in plan.weights.items():
        if spec.role != "embedding":
            source = f"{name}.input" if f"{name}.input" in plan.activations else input_of(plan, name)
            assert source in plan.activations, f"{name} reads {source}"


def test_moved_tensors_carry_the_encoding_of_something_that_exists(model):
    plan = plan_of(model)
    for name, source in plan.moves.items():
        assert name not in plan.activations
        assert source in plan.activations or source == "int32 accumulator of the rotation"
    assert plan.moves["model.layers.1.input_layernorm.input"] == "model.layers.0.output"
    assert plan.moves["model.norm.input"] == "model.layers.1.output"


@pytest.mark.parametrize("preset", PRESETS)
def test_gains_and_fixed_encodings_do_not_depend_on_the_preset(model, preset):
    plan = plan_of(model, preset)
    assert {s.rule.bits for s in plan.weights.values() if s.role == "gain"} == {16}
    fixed = {s.role: s for s in plan.activations.values() if s.fixed}
    assert fixed.keys() == {"rope_table", "probabilities"}
    assert fixed["rope_table"].fixed == (2.0**-14, 0)
    assert fixed["rope_table"].signed
    scale, zero_point = fixed["probabilities"].fixed
    assert zero_point == 0
    assert scale * fixed["probabilities"].grid.qmax == pytest.approx(1.0)


def test_second_operands_of_activation_products_stay_at_8_bits():
    for name, scheme in PRESETS.items():
        assert scheme.activations["key_rotated"] == scheme.activations["value"] == 8, name


def test_weight_bits_of_the_presets():
    model = build("llama")
    for preset, bits, symmetric, granularity in [
        ("w8a8", 8, True, "channel"),
        ("w4a8", 4, True, "channel"),
        ("w4a8-asym", 4, False, "channel"),
        ("w8a8-paper", 8, False, "tensor"),
        ("w4a16", 4, True, "channel"),
    ]:
        rule = plan_of(model, preset).weights["model.layers.0.mlp.up_proj"].rule
        assert (rule.bits, rule.symmetric, rule.granularity) == (bits, symmetric, granularity)
    assert plan_of(model, "w8a8-paper").weights["model.layers.0.mlp.down_proj"].rule.granularity == "channel"


# -- overrides --------------------------------------------------------------------------------------------------------


def changed(before, after):
    return {n for part in ("activations", "weights") for n, s in getattr(after, part).items()
            if getattr(before, part)[n] != s}  # fmt: skip


def test_override_of_activation_bits_changes_those_alone():
    model = build("llama")
    after = plan_of(model, overrides={"*.mlp.down_proj.input": {"bits": 16}})
    assert changed(plan_of(model), after) == {f"model.layers.{i}.mlp.down_proj.input" for i in (0, 1)}
    assert after.activations["model.layers.0.mlp.down_proj.input"].grid.qmax == 65535


def test_override_of_weights_changes_those_alone():
    model = build("llama")
    options = {"weight_bits": 4, "weight_symmetric": False, "weight_granularity": "tensor"}
    after = plan_of(model, overrides={"model.layers.1.*": options})
    linears = {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}
    linears |= {f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert changed(plan_of(model), after) == linears, "norm gains must keep their 16 bits"
    rule = after.weights["model.layers.1.mlp.up_proj"].rule
    assert (rule.bits, rule.symmetric, rule.granularity) == (4, False, "tensor")


def test_one_override_may_change_weights_and_activations_and_later_ones_win():
    model = build("llama")
    overrides = {"*": {"weight_bits": 4, "bits": 16}, "lm_head": {"weight_bits": 8}}
    after = plan_of(model, overrides=overrides)
    assert after.weights["lm_head"].rule.bits == 8
    assert after.weights["model.embed_tokens"].rule.bits == 4
    assert {s.bits for s in after.activations.values()} == {16}


@pytest.mark.parametrize(
    "override",
    [
        {"*.no_such_proj": {"weight_bits": 4}},
        {"model.layers.0.input_layernorm": {"weight_bits": 8}},  # a gain
        {"*.probabilities": {"bits": 8}},  # fixed
        {"*.mlp.up_proj": {"bits": 16}},  # names a weight, changes activations
    ],
    ids=lambda override: next(iter(override)),
)
def test_override_that_changes_nothing_is_refused(override):
    (pattern,) = override
    with pytest.raises(ValueError, match="matches no tensor that .* can change; names look like") as error:
        plan_of(build("llama"), overrides=override)
    assert f'override "{pattern}"' in str(error.value)


def test_a_tied_head_cannot_differ_from_its_embedding():
    model = build("llama-tied")
    with pytest.raises(ValueError, match="lm_head reads the table of model.embed_tokens"):
        plan_of(model, overrides={"lm_head": {"weight_bits": 4}})
    both = plan_of(model, overrides={"lm_head": {"weight_bits": 4}, "model.embed_tokens": {"weight_bits": 4}})
    assert both.weights["lm_head"].rule.bits == both.weights["model.embed_tokens"].rule.bits == 4


# -- schemes and swapping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_scheme_survives_json(preset):
    scheme = PRESETS[preset]
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert scheme.activations.keys() == BASE_ACTIVATIONS.keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["activations"].pop("scores"), "missing \\['scores'\\]"),
        (lambda d: d["activations"].update(extra=8), "unknown \\['extra'\\]"),
        (lambda d: d["weights"].pop("gain"), "missing \\['gain'\\]"),
        (lambda d: d["activations"].update(scores=12), "activation bits must be 8 or 16"),
        (lambda d: d["weights"]["up"].update(bits=5), "weight bits must be 3, 4, 8 or 16"),
    ],
)
def test_damaged_scheme_is_refused(damage, message):
    data = PRESETS["w8a8"].to_dict()
    damage(data)
    with pytest.raises(ValueError, match=message):
        Scheme.from_dict(data)


def test_plan_for_another_model_is_refused_when_swapping():
    model = build("llama")
    plan = plan_of(model)
    extra = {**plan.activations, "model.layers.0.extra": plan.activations["lm_head.output"]}
    with pytest.raises(RuntimeError, match="have no place in the model: .*layers.0.extra"):
        build_student(model, replace(plan, activations=extra))


def test_module_outside_the_plan_is_refused_when_swapping():
    from torch import nn

    model = build("llama")
    model.model.layers[0].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="would stay float: model.layers.0.mlp.extra \\(Linear\\)"):
        build_student(model, plan_of(model))
