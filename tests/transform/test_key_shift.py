"""A constant on all rotated keys of a layer: attention does not see it, the keys' range does, nothing loses it."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.calibrate import collect
from optimum_mobilequant.config.recipes import RECIPES
from optimum_mobilequant.graph.exact import ExactSimulation
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.operators import prepare, shift_of
from optimum_mobilequant.graph.simulation import operation_differences, simulated_codes
from optimum_mobilequant.nn import Mode, set_mode
from optimum_mobilequant.nn.shift import PackedShift, TunableShift
from optimum_mobilequant.transform import SITES, edges_of, refuse_unmergeable
from optimum_mobilequant.transform.matrices import matrix_edges_of
from optimum_mobilequant.transform.shift import shift_keys
from optimum_mobilequant.tune import Learnables, attach_matrices, build_student
from tests.folding import decode, prefill, random_scales, relative_error
from tests.tiny import FAMILIES, VARIANTS, build, config, logits_of, plan_of, probe_ids, run_python, token_ids


def student_of(model, *, seed=3):
    """A student whose keys get a random constant, several times larger than they are."""
    plan = plan_of(model)
    student = build_student(model, plan)
    g, f = plan.geometry, plan.family
    path = (f.key_norm or f.key).removeprefix(f"{f.attention}.")
    generator = torch.Generator().manual_seed(seed)
    for i in range(g.layers):
        source = 5 * torch.randn(g.kv_heads, g.head_dim, generator=generator)
        student.get_submodule(f.layer(i, f.attention)).key_shift = TunableShift(source, path)
    set_mode(student, Mode.OFF)
    return student, plan


@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_does_not_see_it(variant, run):
    model = build(variant)
    student, plan = student_of(model)
    reference = run(model, probe_ids())
    assert relative_error(run(student, probe_ids()), reference) <= 1e-4
    edges = edges_of(plan.family, plan.geometry, SITES)
    Learnables(student, plan, edges, random_scales(edges))  # the constant follows the scales of the keys
    assert relative_error(run(student, probe_ids()), reference) <= 1e-4


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "stablelm"])
def test_it_must_stand_behind_the_rotation(variant):
    """The same constant before it turns with the position, and attention sees that."""
    model = build(variant)
    student, plan = student_of(model)
    reference, f = prefill(model, probe_ids()), plan.family
    for i in range(plan.geometry.layers):
        attention = student.get_submodule(f.layer(i, f.attention))
        added = attention.key_shift.value(attention)[:, 0]
        del attention.key_shift
        where = f.layer(i, f.attention) + f".{f.key_norm}" if f.key_norm else f.layer(i, f.key)
        flat = added if f.key_norm else added.flatten()
        student.get_submodule(where).register_forward_hook(lambda m, a, out, flat=flat: out + flat)
    assert relative_error(prefill(student, probe_ids()), reference) > 1e-2


def test_one_key_without_it_is_seen():
    model = build("llama-gqa")
    student, plan = student_of(model)
    first = student.get_submodule(plan.family.layer(0, plan.family.attention))
    shift = first.key_shift.value(first)

    def without(module, args):
        key = args[0].clone()
        key[:, :, 0] -= shift[:, 0]
        return (key,)

    first.key_rotated.register_forward_pre_hook(without)
    assert relative_error(prefill(student, probe_ids()), prefill(model, probe_ids())) > 1e-2


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_ends_of_every_channel_end_up_at_equal_distance(variant):
    model = build(variant)
    plan = plan_of(model)
    student, ids = build_student(model, plan), torch.tensor(token_ids(8))
    before = collect(student, ids, batch_size=4)
    changed = shift_keys(student, before, plan)
    after = collect(student, ids, batch_size=4)
    seen = 0
    for name, ends in after.channel_ends.items():
        if not name.endswith(".key_rotated"):
            continue
        low, high = ends
        size = before.channel_absmax[name].max()
        assert torch.allclose(low, -high, atol=1e-5 * size)
        assert torch.allclose(changed.channel_absmax[name], after.channel_absmax[name], atol=1e-5 * size)
        assert (after.channel_absmax[name] <= before.channel_absmax[name] * (1 + 1e-5)).all()
        seen += 1
    assert seen == plan.geometry.layers
    others = {k: v for k, v in before.channel_absmax.items() if not k.endswith("key_rotated")}
    assert all(torch.equal(changed.channel_absmax[name], values) for name, values in others.items())


def with_large_key_biases(variant="qwen2"):
    """As Qwen2's: keys with a mean many times their spread, in the pair that rotates slowest."""
    model = build(variant)
    with torch.no_grad():
        for layer in model.model.layers:
            half = layer.self_attn.head_dim // 2
            bias = layer.self_attn.k_proj.bias.view(-1, 2, half)
            bias[:, :, -1] += 200.0
    return model


def test_it_pays_where_keys_have_large_biases():
    model = with_large_key_biases()
    reference = logits_of(model)
    errors = {}
    for shifted in (False, True):
        # of the activations keys and values alone have 8 bits
        result = quantize(copy.deepcopy(model), None, config("w8a16", key_shift=shifted, backend="simulate"))
        errors[shifted] = relative_error(logits_of(result), reference)
    assert errors[True] < 0.5 * errors[False]


def quantized(variant, preset="w8a8", **options):
    return quantize(build(variant), None, config(preset, key_shift=True, backend="simulate", **options))


@pytest.mark.parametrize("variant", [*FAMILIES, "llama-mqa", "llama-bias"])
@pytest.mark.parametrize("preset", ["w8a8", "w8a8-full", "w4a16"])
def test_the_executor_rotates_and_adds_what_the_simulation_does(variant, preset):
    model = quantized(variant, preset)
    executor = IntegerExecutor.of(model)
    found = operation_differences(executor, simulated_codes(model, executor, probe_ids()))
    keys = {name: d for name, d in found.items() if name.endswith(".key_rotated")}
    assert len(keys) == model.config.num_hidden_layers
    assert all(d.largest <= 1 and d.different <= 0.01 * d.codes for d in keys.values()), keys


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "stablelm"])
def test_in_float64_the_simulation_has_the_executors_keys(variant):
    model = quantized(variant)
    executor = IntegerExecutor.of(model)
    found = operation_differences(executor, ExactSimulation(model, executor).codes(probe_ids()))
    keys = [d.different for name, d in found.items() if name.endswith(".key_rotated")]
    assert keys == [0] * model.config.num_hidden_layers


def test_a_code_more_on_one_dim_of_one_head_arrives_there_alone():
    model = quantized("llama-gqa")
    executor = IntegerExecutor.of(model)
    codes = simulated_codes(model, executor, probe_ids())
    op = next(op for op in executor.graph.ops if op.kind == "rope" and len(op.inputs) == 4)
    before = executor.run_op(op, codes)
    held = model.get_submodule(op.name.rpartition(".")[0]).key_shift
    quantizer = model.get_submodule(op.output)
    step = float(quantizer.scale) / float(executor.graph.values[op.inputs[3]].encoding.scale)
    held.codes[1, 2] += round(3 * step)
    moved = prepare(executor.graph, op)(*(codes[name] for name in op.inputs[:3])).int() - before.int()
    inside = (before[:, 1, :, 2] > 0) & (before[:, 1, :, 2] < 250)
    assert inside.any() and (moved[:, 1, :, 2][inside] == 3).all()
    moved[:, 1, :, 2] = 0
    assert not moved.any()


def test_a_constant_off_the_grid_of_the_keys_is_refused():
    model = quantized("llama-gqa")
    graph = IntegerExecutor.of(model).graph
    op = next(op for op in graph.ops if op.kind == "rope" and len(op.inputs) == 4)
    assert shift_of(graph, op) is not None
    graph.values[op.inputs[3]].encoding.scale.mul_(1.5)
    with pytest.raises(ValueError, match="not on a grid of its input's steps"):
        prepare(graph, op)


RELOAD = """
import sys, torch
import optimum_mobilequant
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
from tests.tiny import logits_of, probe_ids
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(probe_ids(), max_new_tokens=6, do_sample=False)
    save_file({"logits": logits_of(model), "ids": ids}, folder + "/out")
"""


def test_reload_in_a_fresh_process_is_bitwise(tmp_path):
    from safetensors.torch import load_file

    cases = [*((family, "w8a8") for family in FAMILIES), ("llama-gqa", "w4a8"), ("llama-gqa", "w8a8-full")]
    models = {f"{tmp_path}/{variant}-{preset}": quantized(variant, preset) for variant, preset in cases}
    for folder, model in models.items():
        model.save_pretrained(folder)
        stored = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert stored["key_shift"] is True
    done = run_python(RELOAD, *models)
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        found = load_file(f"{folder}/out")
        assert torch.equal(found["logits"], logits_of(model)), folder
        assert torch.equal(found["ids"], model.generate(probe_ids(), max_new_tokens=6, do_sample=False))


def test_a_checkpoint_without_the_entry_has_none(tmp_path):
    """One written before there was such a thing, by a recipe that has it by now."""
    model = quantize(build("llama-gqa"), None, config("w8a8", recipe="best", key_shift=False))
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    assert stored["quantization_config"].pop("key_shift") is False
    file.write_text(json.dumps(stored))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, PackedShift) for m in again.modules())
    assert torch.equal(logits_of(again), expected)


def test_a_prefix_is_shifted_too():
    model = quantize(build("llama-gqa"), None, config("w8a8", key_shift=True, prefix=[5, 6], backend="simulate"))
    plain = quantize(build("llama-gqa"), None, config("w8a8", key_shift=False, prefix=[5, 6], backend="simulate"))
    attention, other = (m.model.layers[0].self_attn for m in (model, plain))

    def keys(module):
        return module.prefix.read(module)[0]

    added = attention.key_shift.value(attention)
    steps = (keys(attention) - (keys(other) + added)) / attention.key_rotated.scale
    assert added.abs().max() > 4 * attention.key_rotated.scale
    assert steps.abs().max() <= 2.0  # half a step of each grid, and the constant's own


def test_dequantizing_takes_it_off():
    model = quantized("qwen2")
    rounded = logits_of(model)
    model.dequantize()
    assert "key_shift" not in json.dumps(list(model.state_dict()))
    assert relative_error(logits_of(model), rounded) < 0.2


@pytest.mark.parametrize("variant", ["llama-gqa", "stablelm"])
def test_turns_of_rotary_pairs_carry_it(variant):
    model = build(variant)
    student, plan = student_of(model)
    refuse_unmergeable(model, plan.family, plan.geometry, ("q_k_rotation",), None)
    edges = matrix_edges_of(plan.family, plan.geometry, ("q_k_rotation",), None, seed=0)
    matrices = attach_matrices(student, edges)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.angles.normal_(generator=torch.Generator().manual_seed(1))
            matrix.bind()
            matrix.release()
    set_mode(student, Mode.OFF)
    attention = student.get_submodule(plan.family.layer(0, plan.family.attention))
    assert not torch.allclose(attention.key_shift.value(attention)[:, 0], attention.key_shift.source)
    assert relative_error(prefill(student, probe_ids()), prefill(model, probe_ids())) <= 1e-4


def test_which_recipes_have_it():
    assert {name for name, recipe in RECIPES.items() if recipe.key_shift} == {"best", "qad"}
    assert MobileQuantConfig(recipe="best", dataset=["x"]).resolve().key_shift
    assert not MobileQuantConfig(recipe="best", key_shift=False, dataset=["x"]).resolve().key_shift
    with pytest.raises(ValueError, match="key_shift must be True or False"):
        MobileQuantConfig(key_shift="yes")
