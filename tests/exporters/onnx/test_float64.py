"""The exported graph in float64 is the integer model: what is left against it in float32 is float32's rounding."""

import shutil

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters.onnx.float64 import float64_session, widen  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import logits_runner  # noqa: E402
from optimum_mobilequant.graph.executor import IntegerExecutor  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.tiny import FAMILIES, probe_ids  # noqa: E402

CASES = [(family, "w8a8") for family in FAMILIES]
CASES += [("llama-gqa", "w4a8"), ("llama-bias", "w4a8-asym"), ("stablelm", "w8a16")]
CASES += [(variant, "w8a8+shift") for variant in ("llama-gqa", "qwen2", "qwen3", "stablelm")]
# w8a8-full is left to test_agreement: two equal scores are a tie on its 8-bit probabilities, and one tie is a token.


def integers(variant, preset, ids):
    return IntegerExecutor.of(saved.source(variant, preset).model).forward(ids).logits


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_codes_equal_the_integers(variant, preset):
    ids = probe_ids(batch=2, length=24)
    found = logits_runner(saved.exported(variant, preset), session=float64_session)(ids)
    expected = integers(variant, preset, ids)
    assert (found == expected).float().mean() >= 0.999
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_in_float32_they_do_not():
    """The control: without the widening the first assertion above fails, which a difference of one step shows."""
    ids = probe_ids(batch=2, length=24)
    found = logits_runner(saved.exported())(ids)
    assert (found == integers("llama-gqa", "w8a8", ids)).float().mean() < 0.999


def test_a_changed_scale_is_seen(tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(saved.exported(), folder)
    for name in ("prompt", "token"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        (scale,) = [i for i in model.graph.initializer if i.name == "model.layers.1.mlp.down_proj.input.scale"]
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.001, scale.name))
        onnx.save(model, folder / f"{name}.onnx")
    ids = probe_ids(batch=2, length=24)
    found = logits_runner(folder, session=float64_session)(ids)
    assert (found == integers("llama-gqa", "w8a8", ids)).float().mean() < 0.999


def test_float_inputs_and_outputs_keep_their_type():
    floats = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("a", "y", "z")]
    nodes = [onnx.helper.make_node("Add", ["a", "a"], ["y"]), onnx.helper.make_node("Mul", ["y", "y"], ["z"])]
    graph = onnx.helper.make_graph(nodes, "sums", floats[:1], floats[1:])
    model = widen(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    from onnx.reference import ReferenceEvaluator

    y, z = ReferenceEvaluator(model).run(None, {"a": np.array([0.1, 3.0], np.float32)})
    assert y.dtype == z.dtype == np.float32
    wide = np.float64(np.float32(0.1)) * 2
    assert y[0] == np.float32(wide) and z[0] == np.float32(wide * wide)


def test_an_unknown_operation_is_refused():
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("LpPool", ["x"], ["y"])], "one", [value], [value])
    with pytest.raises(ValueError, match="LpPool is not known in float64"):
        widen(onnx.helper.make_model(graph))
