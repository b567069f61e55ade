"""The memory plan: nothing that is needed is ever written over, and the symbolic peak is the real one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_mobilequant import quantize
from optimum_mobilequant.graph import build_graph
from optimum_mobilequant.graph.memory import ALIGNMENT, plan_memory
from optimum_mobilequant.graph.symbolic import Maximum, Polynomial
from optimum_mobilequant.hf_quantizer import plan_of
from tests import tiny

SIZES = {"batch": st.integers(1, 3), "sequence": st.integers(1, 40), "past": st.integers(0, 200)}
_GRAPHS = {}


def graph_of(variant, preset="w8a8"):
    if (variant, preset) not in _GRAPHS:
        model = quantize(tiny.build(variant), None, tiny.config(preset))
        _GRAPHS[variant, preset] = build_graph(model, plan_of(model, model.config.quantization_config))
    return _GRAPHS[variant, preset]


VARIANTS = [("llama-gqa", "w8a8"), ("qwen3", "w8a8-full"), ("stablelm", "w8a16"), ("gemma", "w8a8")]


def size_of(graph, name, symbols):
    """Bytes of a tensor, computed apart from the plan."""
    count = 1
    for dim in graph.size(name, **symbols):
        count *= dim
    encoding = graph.values[name].encoding
    each = {"input_ids": 4, "attention_mask": 2}.get(name) or encoding.grid.bits // 8
    return count * each


def replay(graph, plan, offsets, sizes, symbols):
    """Run the operations on a list of bytes: each writes its name, and checks that its inputs still hold theirs."""
    home = {name: index for index, buffer in enumerate(plan.buffers) for name in buffer.tensors}
    views = {op.output: op.inputs[-1] for op in graph.ops if op.kind in ("split_heads", "merge_heads")}
    arena = [""] * max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)

    def content(name):
        while name in views:
            name = views[name]
        return name

    def place(name):
        start = offsets[home[name]]
        return slice(start, start + size_of(graph, name, symbols))

    def write(name):
        arena[place(name)] = [content(name)] * size_of(graph, name, symbols)

    for name in graph.inputs:
        if name in home:
            write(name)
    for op in graph.ops:
        for name in op.inputs:
            if name in home:
                held = set(arena[place(name)])
                assert held <= {content(name)}, f"{op.name} reads {name} and finds {held}"
        if op.output in home:
            write(op.output)
    logits = graph.outputs[0]
    assert set(arena[place(logits)]) == {content(logits)}


@pytest.mark.parametrize(("variant", "preset"), VARIANTS)
@settings(max_examples=15)
@given(data=st.data())
def test_no_operation_finds_another_tensor_where_its_input_was(variant, preset, data):
    symbols = {name: data.draw(values, label=name) for name, values in SIZES.items()}
    graph = graph_of(variant, preset)
    plan = plan_memory(graph)
    offsets, arena = plan.place(**symbols)
    sizes = [buffer.bytes(**symbols) for buffer in plan.buffers]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert arena == max(offset + size for offset, size in zip(offsets, sizes, strict=True))
    for i, one in enumerate(plan.buffers):
        for j, other in enumerate(plan.buffers[:i]):
            if one.meets(other):
                assert offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i], (one, other)
    small = {"batch": 1, "sequence": min(symbols["sequence"], 4), "past": min(symbols["past"], 6)}
    replay(graph, plan, plan.place(**small)[0], [b.bytes(**small) for b in plan.buffers], small)


def test_the_replay_notices_an_overlap():
    """All buffers at one place: the check above is not empty."""
    graph, symbols = graph_of("llama-gqa"), {"batch": 1, "sequence": 2, "past": 3}
    plan = plan_memory(graph)
    with pytest.raises(AssertionError, match="reads .* and finds"):
        replay(graph, plan, [0] * len(plan.buffers), [b.bytes(**symbols) for b in plan.buffers], symbols)


@pytest.mark.parametrize(("variant", "preset"), VARIANTS)
@settings(max_examples=30)
@given(data=st.data())
def test_the_symbolic_peak_is_the_sum_of_what_is_alive(variant, preset, data):
    symbols = {name: data.draw(values, label=name) for name, values in SIZES.items()}
    graph = graph_of(variant, preset)
    plan = plan_memory(graph)
    home = {name: index for index, buffer in enumerate(plan.buffers) for name in buffer.tensors}
    peak = 0
    for step in range(len(graph.ops)):
        # alive: written at or before this operation, and read at or after it
        alive = set()
        for name, index in home.items():
            written = next((i for i, op in enumerate(graph.ops) if op.output == name), -1)
            reads = [i for i, op in enumerate(graph.ops) if name in op.inputs] or [written]
            if name in graph.outputs:
                reads.append(len(graph.ops))
            if written <= step <= max(reads):
                alive.add(index)
        peak = max(peak, sum(size_of(graph, plan.buffers[i].tensors[0], symbols) for i in alive))
    assert plan.peak(**symbols) == peak
    arena = plan.place(**symbols)[1]
    assert peak <= arena <= 1.3 * peak + ALIGNMENT * len(plan.buffers)


@pytest.mark.parametrize(("variant", "preset"), VARIANTS)
def test_every_tensor_has_exactly_one_home(variant, preset):
    graph = graph_of(variant, preset)
    plan = plan_memory(graph)
    homes = [name for buffer in plan.buffers for name in buffer.tensors]
    in_cache = {name for name in graph.values if name.startswith("past_") or name.endswith("_cache")}
    in_cache |= set(plan.cached) | {
        op.inputs[0] for op in graph.ops if op.output in plan.cached and op.kind == "split_heads"
    }
    assert len(homes) == len(set(homes))
    assert set(homes) == set(graph.values) - set(graph.constants) - in_cache
    assert set(plan.cached) == set(graph.outputs[1:])


def test_the_cache_is_counted_once_and_keys_and_values_are_written_into_it():
    graph = graph_of("llama-gqa")
    plan = plan_memory(graph)
    # 2 layers, keys and values, 2 heads of 8 bytes
    assert plan.cache(batch=1, sequence=1, past=31) == 2 * 2 * 2 * 8 * 32
    assert str(plan.cache) == "64*batch*past + 64*batch*sequence"
    assert not any("key_rotated" in name or "v_proj" in name for b in plan.buffers for name in b.tensors)


def test_an_activation_is_written_over_its_input_and_a_residual_over_the_last():
    plan = plan_memory(graph_of("llama-gqa"))
    groups = [buffer.tensors for buffer in plan.buffers]
    assert ("model.layers.0.mlp.gate_proj.output", "model.layers.0.mlp.act_fn.output",
            "model.layers.0.mlp.down_proj.input") in groups  # fmt: skip
    (residual,) = [names for names in groups if "model.embed_tokens.output" in names]
    assert residual[-1] == "model.layers.1.output" and len(residual) == 5
    scores = next(names for names in groups if "model.layers.0.self_attn.scores" in names)
    assert scores[1:] == ("model.layers.0.self_attn.masked_scores", "model.layers.0.self_attn.probabilities")


def test_eight_bit_scores_are_not_widened_in_their_own_bytes():
    plan = plan_memory(graph_of("llama-gqa", "w8a8-full"))
    (scores,) = [b.tensors for b in plan.buffers if "model.layers.0.self_attn.scores" in b.tensors]
    assert scores == ("model.layers.0.self_attn.scores",)


def test_the_weights_are_counted_in_their_own_bits():
    eight, four = (plan_memory(graph_of("llama-gqa", preset)).weights for preset in ("w8a8", "w4a8"))
    linears = 2 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 48)
    assert eight - four == linears // 2


def test_json():
    plan = plan_memory(graph_of("llama-gqa"))
    sizes = [{"batch": 1, "sequence": 8, "past": 24}, {"batch": 1, "sequence": 1, "past": 31}]
    found = json.loads(json.dumps(plan.to_dict(sizes)))
    assert [p["arena_bytes"] for p in found["placed"]] == [plan.place(**s)[1] for s in sizes]
    assert found["peak_bytes"] == str(plan.peak) and len(found["buffers"]) == len(plan.buffers)
    assert len(found["placed"][0]["offsets"]) == len(found["buffers"])
    names = {"batch": 1, "sequence": 8, "past": 24, "max": max}
    assert eval(found["peak_bytes"], {"__builtins__": {}}, names) == found["placed"][0]["peak_bytes"]


def test_polynomials():
    size = Polynomial.size(("batch", 2, "sequence", "total"), 3)
    assert str(size) == "6*batch*past*sequence + 6*batch*sequence*sequence"
    assert size(batch=2, sequence=3, past=4) == 3 * 2 * 2 * 3 * 7
    assert str(Polynomial.of(0)) == "0" and str(Polynomial.of("past")) == "past"
    assert (size + Polynomial.of(5))(batch=0, sequence=1, past=1) == 5
    with pytest.raises(ValueError, match="'heads' is no symbol"):
        Polynomial.of("heads")


def test_a_maximum_keeps_what_no_other_reaches():
    a, b, c = Polynomial.size(("sequence",), 2), Polynomial.size(("sequence",), 3), Polynomial.of(7)
    top = Maximum.of([a, b, c, b])
    assert str(top) == "max(3*sequence, 7)"
    assert (top(sequence=1), top(sequence=5)) == (7, 15)
    assert Maximum.of([])(sequence=1) == 0
