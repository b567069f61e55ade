"""What the executor is given: padding, windows, scaled positions, caches, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.graph import build_graph
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.ir import Encoding
from optimum_mobilequant.hf_quantizer import plan_of
from tests.tiny import FAMILIES, build, config, probe_ids


@pytest.fixture(scope="module")
def executor():
    return IntegerExecutor.of(quantize(build("llama-gqa"), None, config()))


@pytest.fixture(scope="module", params=FAMILIES)
def any_executor(request):
    return IntegerExecutor.of(quantize(build(request.param), None, config()))


def padded(ids, left, right):
    batch = len(ids)
    mask = torch.cat([torch.zeros(batch, left), torch.ones_like(ids), torch.zeros(batch, right)], 1).long()
    filler = torch.full((batch, left + right), 5)
    return torch.cat([filler[:, :left], ids, filler[:, left:]], 1), mask


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 2)])
def test_padding_on_either_side_changes_nothing(any_executor, left, right):
    executor = any_executor
    ids = probe_ids()
    filled, mask = padded(ids, left, right)
    found = executor.forward(filled, mask).logits[:, left : left + ids.shape[1]]
    assert torch.equal(found, executor.forward(ids).logits)


def test_padding_without_its_mask_changes_much(executor):
    ids = probe_ids()
    filled, _ = padded(ids, 3, 0)
    assert not torch.equal(executor.forward(filled).logits[:, 3:], executor.forward(ids).logits)


def test_texts_of_different_lengths_continue_as_they_do_alone(executor):
    short, long = probe_ids(1, 5), probe_ids(1, 9, seed=8)
    filled, mask = padded(short, 4, 0)
    both = executor.generate(torch.cat([filled, long]), 6, torch.cat([mask, torch.ones_like(long)]))
    assert torch.equal(both[:1, 4:], executor.generate(short, 6))
    assert torch.equal(both[1:], executor.generate(long, 6))


def test_generation_continues_with_the_most_likely_token(executor):
    ids = probe_ids()
    found = executor.generate(ids, 3)
    for length in range(ids.shape[1], found.shape[1]):
        assert torch.equal(executor.forward(found[:, :length]).logits[:, -1].argmax(-1), found[:, length])


def test_a_sliding_window_is_respected():
    ids = probe_ids(2, 16)
    near, far = (
        IntegerExecutor.of(quantize(build("mistral", sliding_window=window), None, config())) for window in (4, None)
    )
    mask = near.inputs(ids).visible
    assert mask[0, 0, 9].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert far.inputs(ids).visible[0, 0, 9].sum() == 10
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 11) % 90
    # two layers carry a token twice the window less two positions far
    assert torch.equal(near.forward(ids).logits[:, 8:], near.forward(other).logits[:, 8:])
    assert not torch.equal(far.forward(ids).logits[:, 8:], far.forward(other).logits[:, 8:])


def test_layers_with_windows_of_their_own_are_refused():
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = quantize(build("qwen2", **options), None, config())
    with pytest.raises(ValueError, match="attend in different ways"):
        IntegerExecutor.of(model)


def test_scaled_positions_come_from_the_model():
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    plain, scaled = (
        IntegerExecutor.of(quantize(build("llama", **changes), None, config()))
        for changes in ({}, {"rope_parameters": scaling})
    )
    assert torch.equal(scaled.inputs.cos[4::4], plain.inputs.cos[1 : 1 + len(scaled.inputs.cos[4::4])])
    assert not torch.equal(scaled.inputs.cos, plain.inputs.cos)


def test_a_trace_holds_every_tensor(executor):
    trace: dict[str, torch.Tensor] = {}
    out = executor.forward(probe_ids(), trace=trace)
    assert list(trace) == [op.output for op in executor.graph.ops]
    for name, codes in trace.items():
        grid = executor.graph.values[name].encoding.grid
        assert codes.dtype is grid.dtype and grid.qmin <= codes.min() <= codes.max() <= grid.qmax
        assert tuple(codes.shape) == executor.graph.size(name, batch=2, sequence=12, past=0)
    assert torch.equal(trace[executor.graph.outputs[0]], out.logits)


def test_hidden_positions_have_no_probability(executor):
    trace: dict[str, torch.Tensor] = {}
    filled, mask = padded(probe_ids(), 3, 0)
    executor.forward(filled, mask, trace=trace)
    hidden = ~executor.inputs(filled, mask).visible.expand(-1, 4, -1, -1)
    for name in (name for name in trace if name.endswith("probabilities")):
        seen = ~hidden.all(-1)  # a row of padding sees nothing, and its softmax is uniform
        assert int(trace[name][hidden & seen[..., None]].max()) == 0


def test_bad_inputs_are_refused(executor):
    ids = probe_ids()
    step = executor.inputs(ids)
    given = {"cos": step.cos, "sin": step.sin, "visible": step.visible}
    with pytest.raises(ValueError, match="vocabulary has 96"):
        executor.forward(ids + 96)
    with pytest.raises(ValueError, match="whole numbers"):
        executor.forward(ids[0])
    with pytest.raises(ValueError, match="must hold integers"):
        executor.run(ids, **given | {"cos": step.cos.float()})
    with pytest.raises(ValueError, match="cache holds 1 layers"):
        executor.run(ids, **given, past=executor.start_cache(2)[:1])
    with pytest.raises(ValueError, match=r"need \[2, 12\]"):
        executor.forward(ids, torch.ones(2, 11))
    with pytest.raises(ValueError, match="reaches position 69"):
        executor.forward(probe_ids(1, 70))
    with pytest.raises(ValueError, match=r"IntegerExecutor.of"):
        IntegerExecutor(executor.graph).forward(ids)


def test_graphs_without_encodings_are_refused():
    model = quantize(build("llama"), None, config())
    graph = build_graph(model, plan_of(model, model.config.quantization_config))
    name = graph.ops[2].output
    value = graph.values[name]
    graph.values[name] = type(value)(value.name, value.shape, None, value.role)
    with pytest.raises(ValueError, match=f"{name} has no encoding"):
        IntegerExecutor(graph)


def test_probabilities_on_another_grid_are_refused():
    model = quantize(build("llama"), None, config())
    graph = build_graph(model, plan_of(model, model.config.quantization_config))
    name = next(op.output for op in graph.ops if op.kind == "softmax")
    value = graph.values[name]
    other = Encoding(value.encoding.scale * 2, value.encoding.zero_point, value.encoding.grid)
    graph.values[name] = type(value)(value.name, value.shape, other, value.role)
    with pytest.raises(ValueError, match="grid from 0 to 1"):
        IntegerExecutor(graph)
