"""The constant behind the rotation of keys: where it stands, what it holds, and that leaving it out is noticed."""

import shutil

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from onnx import TensorProto, numpy_helper  # noqa: E402

from optimum_mobilequant.exporters.onnx import COVERED, FLOAT, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.float64 import float64_session  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import cpu_session, logits_runner  # noqa: E402
from optimum_mobilequant.exporters.onnx.types import limits, refined  # noqa: E402
from optimum_mobilequant.graph.executor import IntegerExecutor  # noqa: E402
from optimum_mobilequant.graph.memory import plan_memory  # noqa: E402
from optimum_mobilequant.numerics import dequantize  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.exporters.onnx.test_forms import feeds_of  # noqa: E402
from tests.tiny import probe_ids, token_ids  # noqa: E402

LAYER = "model.layers.0.self_attn"


def emitted(variant, preset, form, folder):
    with WeightStore(folder / "model.data") as store:
        made = emit(saved.source(variant, preset).graph, Layout.fixed(12, 16), form, store, name="graph")
    onnx.save(made.model, folder / "graph.onnx")
    return made


@pytest.mark.parametrize(
    "changed", [np.zeros_like, lambda values: values[::-1], lambda values: np.roll(values, 1, -1)]
)
def test_another_shift_is_another_model(changed, tmp_path):
    """None, the other head's, the next channel's."""
    folder, ids = tmp_path / "changed", probe_ids(batch=2, length=24)
    shutil.copytree(saved.exported("qwen2", "w8a8+shift"), folder)
    for name in ("prompt", "token"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        (codes,) = [i for i in model.graph.initializer if i.name == f"{LAYER}.key_shift.codes"]
        values = numpy_helper.to_array(codes).astype(np.int32) - 2**15
        codes.CopyFrom(numpy_helper.from_array((changed(values) + 2**15).astype(np.uint16), codes.name))
        onnx.save(model, folder / f"{name}.onnx")
    expected = IntegerExecutor.of(saved.source("qwen2", "w8a8+shift").model).forward(ids).logits
    same = (logits_runner(folder, session=float64_session)(ids) == expected).float().mean()
    assert same < 0.5


def test_all_graphs_hold_the_checkpoints_codes():
    folder, model = saved.exported("qwen2", "w8a8+shift"), saved.source("qwen2", "w8a8+shift").model
    attention = model.get_submodule(LAYER)
    for name in ("prompt", "token", "model_dynamic"):
        graph = onnx.load(folder / f"{name}.onnx").graph
        held = {i.name: i for i in graph.initializer}
        codes = held[f"{LAYER}.key_shift.codes"]
        assert codes.data_type == TensorProto.UINT16 and list(codes.dims) == [2, 1, 8]
        stored = numpy_helper.to_array(codes).astype(np.int32)[:, 0] - 2**15
        assert np.array_equal(stored, attention.key_shift.codes.numpy()) and np.abs(stored).max() > 500
        # 16-bit keys: four of their steps
        assert float(numpy_helper.to_array(held[f"{LAYER}.key_shift.scale"])) == 4 * attention.k_proj.output.scale
        (added,) = [node for node in graph.node if f"{LAYER}.key_shift" in node.input]
        assert (added.op_type, added.output[0]) == ("Add", f"{LAYER}.key_rotated.float")
        assert not any("query" in text for node in graph.node for text in node.input if "shift" in text)


@pytest.mark.parametrize("variant", ["llama-mqa", "qwen3", "stablelm"])
def test_the_float_form_moves_the_keys(variant, tmp_path):
    """Its logits are those of any shift, so the keys are looked at."""
    # seen in calibration, so that nothing is clipped
    source, ids = saved.source(variant, "w8a8+shift"), torch.tensor(token_ids()[:1])[:, :12]
    made = emitted(variant, "w8a8+shift", FLOAT, tmp_path)
    feeds = {}
    for name, codes in feeds_of(source, made, ids).items():
        record = made.records.get(name)
        values = codes if record is None else (codes.astype(np.float64) - int(record.encoding.zero_point))
        feeds[name] = codes if record is None else (values * float(record.encoding.scale)).astype(np.float32)
    (keys,) = cpu_session(tmp_path / "graph.onnx").run(["past_key_0_out"], feeds)
    codes = IntegerExecutor.of(source.model).forward(ids).past[0][0]
    encoding = source.graph.values[f"{LAYER}.key_rotated"].encoding
    expected = dequantize(codes, encoding.scale, encoding.zero_point)[0].transpose(1, 2).numpy()
    attention = source.model.get_submodule(LAYER)
    shift = attention.key_shift.value(attention).transpose(1, 2).numpy()
    error, without = (np.linalg.norm(keys[:, 0] - moved - expected) for moved in (0.0, shift))
    assert error <= 0.04 * np.linalg.norm(expected) and without >= 4 * error


@pytest.mark.parametrize(("variant", "preset"), [("qwen2", "w8a8-full"), ("stablelm", "w8a8"), ("qwen3", "w8a16")])
def test_before_the_sum_nothing_is_cut_off(variant, preset, tmp_path):
    """Unshifted keys are on a grid for any of them, and the sum is narrowed to 8 bits last."""
    records = emitted(variant, f"{preset}+shift", COVERED, tmp_path).records
    key, source = f"{LAYER}.key_rotated", saved.source(variant, f"{preset}+shift").graph
    (op,) = [op for op in source.ops if op.output == key]
    reach = max(map(abs, limits(records[op.inputs[0]].encoding))) * 2**0.5
    parts = ["rotated_first", "rotated_second", "rotated"] + ["passed_rounded"] * (variant == "stablelm")
    for part in parts:
        grid = records[f"{key}.{part}"].encoding
        low, high = limits(grid)
        assert grid.grid.bits == 16 and abs(low + reach) <= grid.scale and abs(high - reach) <= grid.scale, part
    assert records[f"{key}.product"].encoding.same_as(refined(records[key].encoding))
    assert records[key].encoding.grid.bits == 8


def test_the_shift_is_a_constant_of_the_memory_plan():
    plain, shifted = (plan_memory(saved.source("qwen2", preset).graph) for preset in ("w8a8", "w8a8+shift"))
    layers, heads, size = 2, 2, 8
    assert shifted.weights - plain.weights == layers * (heads * size * 2 + 4)  # codes and a scale
    assert [b.tensors for b in shifted.buffers] == [b.tensors for b in plain.buffers]
