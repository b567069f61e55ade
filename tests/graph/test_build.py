"""The graph of every family is complete, has the checkpoint's encodings, and computes what the model does."""

import copy
from dataclasses import replace

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.graph import KINDS, MOVES, Encoding, build_graph
from optimum_mobilequant.graph.build import activation_name, masked_encoding
from optimum_mobilequant.graph.source import CheckpointSource
from optimum_mobilequant.hf_quantizer import plan_of
from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.plan import ActivationSpec
from tests import tiny
from tests.graph import floating

CASES = [(variant, "w8a8") for variant in tiny.FAMILIES]
CASES += [("llama-bias", "w8a8-paper"), ("qwen3", "w4a8-asym"), ("gemma", "w8a8-full"), ("stablelm", "w4a8")]
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made():
    """(variant, preset) -> model, plan and graph; each is made once."""
    cache = {}

    def make(variant, preset="w8a8"):
        if (variant, preset) not in cache:
            model = quantize(tiny.build(variant), None, tiny.config(preset))
            plan = plan_of(model, model.config.quantization_config)
            cache[variant, preset] = model, plan, build_graph(model, plan)
        return cache[variant, preset]

    return make


def folded(plan):
    """Tensors that carry 1/sqrt(head_dim)."""
    f, names = plan.family, set()
    for i in range(plan.geometry.layers):
        attn, query = f.layer(i, f.attention), f.layer(i, f.query)
        names |= {f"{attn}.query_rotated", f"{attn}.{f.query_norm}.output" if f.query_norm else f"{query}.output"}
    return names


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_every_tensor_of_the_plan_is_made_once_and_before_it_is_read(made, variant, preset):
    _, plan, graph = made(variant, preset)
    ready = {*graph.inputs, *graph.constants}
    for op in graph.ops:
        assert op.kind in KINDS
        assert set(op.inputs) <= ready, op.name
        assert op.output not in ready, op.output
        ready.add(op.output)
    assert ready == set(graph.values)
    assert set(graph.outputs) <= ready
    assert set(plan.activations) - {f"{plan.family.rotary}.output"} <= {op.output for op in graph.ops}
    read = {name for op in graph.ops for name in op.inputs}
    assert ready - read == {graph.outputs[0]}  # nothing is made for nothing
    assert len({op.name for op in graph.ops}) == len(graph.ops)
    assert len(graph.outputs) == 1 + 2 * plan.geometry.layers


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_encodings_are_the_checkpoints(made, variant, preset):
    model, plan, graph = made(variant, preset)
    scaled = folded(plan)
    for name, spec in plan.activations.items():
        quantizer = model.get_submodule(name)
        encoding = graph.values["position_cos" if name == f"{plan.family.rotary}.output" else name].encoding
        factor = plan.geometry.head_dim**-0.5 if name in scaled else 1.0
        assert encoding.scale == quantizer.scale * factor, name
        assert encoding.zero_point == quantizer.zero_point
        assert encoding.grid == spec.grid
    for name in graph.constants:
        value = graph.values[name]
        codes = graph.constants[name]()
        assert tuple(codes.shape) == value.shape
        assert codes.dtype == value.encoding.grid.dtype
        assert value.encoding.scale.numel() in (1, value.shape[0])
        assert value.encoding.grid.qmin <= codes.min() and codes.max() <= value.encoding.grid.qmax
    for op in graph.ops:
        if op.kind in MOVES:
            source = graph.values[op.output].moved_from
            assert source == op.inputs[-1]
            assert graph.values[op.output].encoding.same_as(graph.values[source].encoding)
    for i in range(plan.geometry.layers):  # what goes into the cache is what comes out of it
        new_key, new_value = graph.outputs[1 + 2 * i : 3 + 2 * i]
        assert graph.values[f"past_key_{i}"].encoding.same_as(graph.values[new_key].encoding)
        assert graph.values[f"past_value_{i}"].encoding.same_as(graph.values[new_value].encoding)


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_biases_lie_on_the_accumulators_grid(made, variant, preset):
    _, _, graph = made(variant, preset)
    found = 0
    for op in graph.ops:
        if op.kind != "linear" or len(op.inputs) < 3:
            continue
        x, weight, bias = (graph.values[name].encoding for name in op.inputs)
        torch.testing.assert_close(bias.scale, (x.scale * weight.scale).expand_as(bias.scale), rtol=1e-6, atol=0)
        assert bias.grid == Grid(32, signed=True)
        found += 1
    assert (found > 0) == (variant in ("qwen2", "llama-bias", "stablelm"))


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_shapes_follow_from_the_operations(made, variant, preset):
    model, plan, graph = made(variant, preset)
    sizes = {"batch": 2, "sequence": 5, "past": 0}
    values = floating.run(graph, model, plan, tiny.probe_ids(2, 5))
    for name, value in values.items():
        expected = graph.size(name, **sizes)
        if name.startswith("position_"):
            expected = (1, *expected[1:])
        assert tuple(value.shape) == (expected if name != "attention_mask" else expected[2:]), name


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_the_graph_computes_what_the_model_does(made, variant, preset):
    model, plan, graph = made(variant, preset)
    ids = tiny.probe_ids(2, 12)
    logits = floating.run(graph, model, plan, ids)[graph.outputs[0]]
    assert floating.decibels(tiny.logits_of(model, ids), logits) > 60


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "stablelm"])
def test_a_shift_of_keys_is_an_operand_of_their_rotation(variant):
    model = quantize(tiny.build(variant), None, tiny.config(key_shift=True))
    plan, ids = plan_of(model, model.config.quantization_config), tiny.probe_ids(2, 12)
    graph = build_graph(model, plan)
    shifts = [name for name, value in graph.values.items() if value.role == "shift"]
    assert shifts == [f"model.layers.{i}.self_attn.key_shift" for i in range(2)]
    assert shifts == [op.inputs[3] for op in graph.ops if op.kind == "rope" and len(op.inputs) == 4]
    expected, logits = tiny.logits_of(model, ids), floating.run(graph, model, plan, ids)[graph.outputs[0]]
    assert floating.decibels(expected, logits) > 60
    graph.constants |= {name: lambda: torch.zeros(2, 1, plan.geometry.head_dim) for name in shifts}
    assert floating.decibels(expected, floating.run(graph, model, plan, ids)[graph.outputs[0]]) < 40


def test_the_cache_continues_a_text(made):
    model, plan, graph = made("llama-gqa")
    ids = tiny.probe_ids(1, 9)
    whole = floating.run(graph, model, plan, ids)[graph.outputs[0]]
    first = floating.run(graph, model, plan, ids[:, :5])
    rest = floating.run(graph, model, plan, ids[:, 5:], past=first)[graph.outputs[0]]
    assert floating.decibels(whole[:, 5:], rest) > 60


@pytest.mark.parametrize("name", [f"{QUERY}.output", f"{QUERY}.weight", "model.layers.0.mlp.down_proj.input"])
def test_a_changed_encoding_changes_the_result(made, name):
    model, plan, graph = made("llama-gqa")
    changed = copy.copy(graph)
    value = graph.values[name]
    changed.values = graph.values | {name: replace(value, encoding=value.encoding.scaled(0.25))}
    logits = floating.run(changed, model, plan, tiny.probe_ids(2, 12))[graph.outputs[0]]
    assert floating.decibels(tiny.logits_of(model, tiny.probe_ids(2, 12)), logits) < 40


def test_the_softmax_scale_is_in_the_query_projection_exactly(made):
    model, _, graph = made("llama-gqa")
    weight = graph.values[f"{QUERY}.weight"].encoding
    held = model.get_submodule(QUERY).weight
    assert torch.equal(weight.scale, held.scale.flatten() * torch.tensor(8**-0.5))
    assert torch.equal(graph.constants[f"{QUERY}.weight"](), held.codes)
    key = graph.values[QUERY.replace("q_proj", "k_proj") + ".weight"].encoding
    assert torch.equal(key.scale, model.get_submodule(QUERY.replace("q_proj", "k_proj")).weight.scale.flatten())


def test_the_softmax_scale_of_a_normalized_query_is_in_the_norms_gain(made):
    model, _, graph = made("qwen3")
    norm = QUERY.replace("q_proj", "q_norm")
    held = model.get_submodule(QUERY).weight
    assert torch.equal(graph.values[f"{QUERY}.weight"].encoding.scale, held.scale.flatten())
    assert graph.values[f"{QUERY}.output"].encoding.scale == model.get_submodule(QUERY).output.scale
    gain = model.get_submodule(norm).weight
    assert graph.values[f"{norm}.weight"].encoding.scale == gain.scale[0] * 16**-0.5


def test_leaving_the_softmax_scale_out_is_noticed(made, monkeypatch):
    model, plan, _ = made("llama-gqa")
    monkeypatch.setattr("optimum_mobilequant.graph.build._Builder.softmax_scale", lambda self, attention: 1.0)
    graph = build_graph(model, plan)
    logits = floating.run(graph, model, plan, tiny.probe_ids(2, 12))[graph.outputs[0]]
    assert floating.decibels(tiny.logits_of(model, tiny.probe_ids(2, 12)), logits) < 20


def test_a_tied_head_reads_the_embeddings_integers(made):
    model, _, graph = made("llama-tied")
    assert torch.equal(graph.constants["lm_head.weight"](), model.get_submodule("model.embed_tokens").weight.codes)
    table, logits = graph.values["model.embed_tokens.table"], graph.values["model.embed_tokens.output"]
    assert table.encoding.same_as(logits.encoding)


def test_an_activation_without_an_operation_is_refused(made):
    model, plan, _ = made("llama-gqa")
    extra = plan.activations | {"model.layers.0.extra": ActivationSpec("model.layers.0.extra", "residual", 16)}
    with pytest.raises(RuntimeError, match="without an operation: .*model.layers.0.extra"):
        build_graph(model, replace(plan, activations=extra))


def test_a_renamed_activation_is_refused(made):
    model, plan, _ = made("llama-gqa")
    name = "model.layers.0.self_attn.scores"
    renamed = {(f"{n}_2" if n == name else n): spec for n, spec in plan.activations.items()}
    with pytest.raises(RuntimeError, match="without an operation: .*scores_2"):
        build_graph(model, replace(plan, activations=renamed))


def test_rotary_tables_that_depend_on_the_length_are_refused(made):
    model, plan, _ = made("llama-gqa")
    rotary = model.get_submodule(plan.family.rotary)
    kept, rotary.rope_type = rotary.rope_type, "dynamic"
    try:
        with pytest.raises(ValueError, match='"dynamic" changes its tables .* default, linear, llama3, yarn'):
            build_graph(model, plan)
    finally:
        rotary.rope_type = kept


def test_a_function_of_the_models_own_is_refused():
    with pytest.raises(ValueError, match="Swirl is none of transformers' own"):
        activation_name(type("Swirl", (torch.nn.Module,), {})())


@pytest.mark.parametrize(("kind", "name"), [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_pytorch_tanh")])
def test_functions_are_called_as_transformers_calls_them(kind, name):
    from transformers.activations import ACT2FN

    assert activation_name(ACT2FN[kind]) == name


def test_masked_scores_keep_the_steps_of_8_bit_scores():
    narrow = Encoding(torch.tensor(0.1), torch.tensor(200, dtype=torch.int32), Grid(8, signed=False))
    wide = masked_encoding(narrow)
    assert wide.scale == narrow.scale
    top = (255 - narrow.zero_point) * narrow.scale
    assert (wide.grid.qmax - wide.zero_point) * wide.scale == top
    assert (0 - wide.zero_point) * wide.scale < -6000


def test_blocks_of_a_matrix_broadcast_to_its_codes():
    scale, zero = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    encoding = Encoding(scale, zero, Grid(4, signed=True), block_size=3)
    assert encoding.per_block and not encoding.per_channel
    spread, zeros = encoding.broadcast(2)
    assert spread.tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    assert zeros.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    assert encoding.scaled(2.0).block_size == 3
    assert not encoding.same_as(Encoding(scale, zero, Grid(4, signed=True), block_size=4))


def test_the_source_of_a_checkpoint_reads_without_changing_the_model(made):
    model, plan, _ = made("llama-gqa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    source = CheckpointSource(model, plan)
    assert torch.equal(source.weight(QUERY).scaled(2.0).read(), source.weight(QUERY).read())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
