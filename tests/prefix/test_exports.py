"""A prefix in the integer graph and in what is exported: initial content of the cache, nothing else."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from optimum_mobilequant import compare, quantize
from optimum_mobilequant.exporters import export
from optimum_mobilequant.graph.exact import ExactSimulation
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.simulation import operation_differences, simulated_codes
from optimum_mobilequant.nn.prefix import prefix_codes
from tests.prefix.fixture import PREFIX, quantized, saved
from tests.tiny import FAMILIES, build, config, probe_ids

SIZES = {"context": 32, "prompt_length": 8}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return quantized(request.param)


def test_the_executor_equals_the_exact_simulation(model):
    executor = IntegerExecutor.of(model)
    found = executor.dequantize(executor.graph.outputs[0], executor.forward(probe_ids()).logits)
    exact = ExactSimulation(model, executor).logits(probe_ids())
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    differences = operation_differences(executor, simulated_codes(model, executor, probe_ids()))
    assert max(d.largest for d in differences.values()) <= 1
    assert max(d.different / d.codes for d in differences.values()) <= 5e-3


def test_executor_decoding_equals_prefill_bit_for_bit(model):
    executor, ids = IntegerExecutor.of(model), probe_ids()
    whole = executor.forward(ids)
    first = executor.forward(ids[:, :5])
    rest = executor.forward(ids[:, 5:], past=first.past)
    assert torch.equal(torch.cat([first.logits, rest.logits], 1), whole.logits)
    assert whole.past[0][0].shape[2] == len(PREFIX) + ids.shape[1]
    filler, mask = torch.full((2, 3), 5), (torch.arange(15) >= 3).long().expand(2, -1)
    padded = executor.forward(torch.cat([filler, ids], 1), mask)
    assert torch.equal(padded.logits[:, 3:], whole.logits)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert (executor.generate(ids, 6) == model.generate(ids, **greedy)).float().mean() > 0.9


def test_the_graph_has_the_same_operations_as_without():
    with_prefix = IntegerExecutor.of(quantized()).graph
    without = IntegerExecutor.of(quantize(build("llama-gqa"), None, config())).graph
    assert [(op.kind, op.name, op.inputs) for op in with_prefix.ops] == [
        (op.kind, op.name, op.inputs) for op in without.ops
    ]
    assert with_prefix.inputs == without.inputs and with_prefix.prefix_length == 2 and without.prefix_length == 0


def test_without_its_prefix_the_executor_computes_something_else():
    executor = IntegerExecutor.of(quantized())
    expected = executor.forward(probe_ids()).logits
    executor.graph.prefix = {name: torch.full_like(codes, 128) for name, codes in executor.graph.prefix.items()}
    assert (executor.forward(probe_ids()).logits != expected).float().mean() > 0.2


def test_positions_end_before_those_of_the_prefix():
    executor = IntegerExecutor.of(quantized())
    executor.forward(probe_ids(1, 62))
    with pytest.raises(ValueError, match="there are 62"):
        executor.forward(probe_ids(1, 63))


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "stablelm"])
def test_onnx_equals_the_simulation(variant, tmp_path):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    export(saved(variant), "onnx", tmp_path / "onnx", **SIZES)
    build(variant).save_pretrained(tmp_path / "float")
    ids = probe_ids(1, 60)[0]
    options = {"onnx": tmp_path / "onnx", "float_model": str(tmp_path / "float"), "seq_len": 30, "progress": False}
    found = compare(saved(variant), ids, **options)
    assert found.pairs["integer/simulate"].equal > 0.999
    assert found.pairs["onnx/simulate"].sqnr_db > 50
    assert set(found.runners) >= {"float", "float_prefix"}
    # it follows the float model behind the prefix, not the one without
    pairs = found.pairs
    assert pairs["simulate/float_prefix"].sqnr_db > pairs["simulate/float"].sqnr_db + 6


def test_onnx_files_of_a_prefix(tmp_path):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    from optimum_mobilequant.exporters.onnx.runtime import OnnxModel, logits_runner

    export(saved(), "onnx", tmp_path / "onnx", **SIZES)
    about = json.loads((tmp_path / "onnx" / "graphs.json").read_text())
    held = load_file(tmp_path / "onnx" / about["prefix"]["file"])
    assert about["prefix"]["length"] == 2
    for i, (key, value) in enumerate(prefix_codes(quantized())):
        assert np.array_equal(held[f"past_key_{i}_in"], key.numpy()[:, None].swapaxes(2, 3))
        assert np.array_equal(held[f"past_value_{i}_in"], value.numpy()[:, None])
    model = OnnxModel(tmp_path / "onnx")
    with pytest.raises(ValueError, match=r"2 \+ 31 tokens do not fit"):
        model.step(probe_ids(1, 31)[0].numpy())
    # chunks and single tokens see the same prefix
    ids, run = probe_ids(1, 20), logits_runner(tmp_path / "onnx")
    whole = run(ids)
    run.model.reset()
    steps = [run.model.step(ids[0, i : i + 1].numpy()) for i in range(20)]
    assert (torch.from_numpy(np.concatenate(steps).astype(np.int32)) == whole[0]).float().mean() > 0.9
    expected = whole.clone()
    run.model.prefix = {}
    assert (run(ids) != expected).float().mean() > 0.2, "an empty cache should compute something else"


def test_compare_refuses_an_export_without_room_for_the_prefix(tmp_path):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    export(saved(), "onnx", tmp_path / "onnx", **SIZES)
    with pytest.raises(ValueError, match="windows have 31 behind a prefix of 2.*--context 33"):
        compare(saved(), probe_ids(1, 60)[0], onnx=tmp_path / "onnx", seq_len=31, progress=False)
    with pytest.raises(ValueError, match="64 positions behind a prefix of 2"):
        compare(saved(), probe_ids(1, 64)[0], seq_len=63, progress=False)


def test_qnn_states_the_prefix_and_ai_hub_samples_hold_it(tmp_path):
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    from optimum_mobilequant.exporters.ai_hub.folders import read_folders
    from optimum_mobilequant.exporters.ai_hub.reference import Reference

    export(saved(), "qnn", tmp_path / "qnn", **SIZES)
    spec = json.loads((tmp_path / "qnn" / "io_spec.json").read_text())
    held = load_file(tmp_path / "qnn" / spec["prefix"]["file"])
    for graph, feeds in Reference(saved(), tmp_path).samples(read_folders(tmp_path / "qnn")).items():
        for name, codes in held.items():
            assert np.array_equal(feeds[name][tuple(slice(n) for n in codes.shape)], codes), (graph, name)
        mask = feeds["attention_mask"][0, 0]
        assert (mask[:, :2] == mask.max()).all() and (mask[:, 2:-8] == 0).all()


@pytest.mark.parametrize(("target", "reason"), [("compressed-tensors", "no place for them")])
def test_formats_without_a_cache_refuse_it(target, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export(saved(), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_context_without_room_is_refused(tmp_path):
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    with pytest.raises(ValueError, match="the first 2 of 10 tokens of context belong to the checkpoint's prefix"):
        export(saved(), "onnx", tmp_path / "out", context=10, prompt_length=9)
    export(saved(), "onnx", tmp_path / "out", context=4)
