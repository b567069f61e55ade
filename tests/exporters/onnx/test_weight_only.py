"""Models of optimum-quanto, with integer weights and float activations: floats at the border, quanto's own logits."""

import functools
import json

import pytest
import torch
from optimum.quanto import MaxOptimizer, QuantizedModelForCausalLM

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from onnx import TensorProto  # noqa: E402

from optimum_mobilequant.exporters import export  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import logits_runner  # noqa: E402
from tests import tiny  # noqa: E402

WIDE = {"hidden_size": 256, "intermediate_size": 160, "head_dim": 64}  # rows of 256 and 160: blocks of 128 and 32


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen2", "qwen3", "gemma", "stablelm"])
def test_8_bit_weights_per_channel(variant, tmp_path):
    made = QuantizedModelForCausalLM.quantize(tiny.build(variant), weights="qint8")
    made.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "onnx", tmp_path / "out", context=32, prompt_length=8)
    ids = tiny.probe_ids()
    torch.testing.assert_close(
        logits_runner(tmp_path / "out")(ids), tiny.logits_of(made._wrapped, ids), rtol=1e-3, atol=1e-3
    )
    ports = json.loads((tmp_path / "out" / "graphs.json").read_text())["graphs"]["token"]
    kinds = {port["type"] for name, port in (ports["inputs"] | ports["outputs"]).items() if name != "input_ids"}
    assert kinds == {"float"} and ports["inputs"]["attention_mask"]["hidden"] == -1000.0


def test_4_bit_weights_per_block(tmp_path):
    whole_steps = functools.partial(MaxOptimizer(), zeropoint=True)  # integer zero points
    made = QuantizedModelForCausalLM.quantize(tiny.build("llama-gqa", **WIDE), weights="qint4", optimizer=whole_steps)
    made.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "onnx", tmp_path / "out", context=32, prompt_length=8)
    ids = tiny.probe_ids()
    torch.testing.assert_close(
        logits_runner(tmp_path / "out")(ids), tiny.logits_of(made._wrapped, ids), rtol=1e-3, atol=1e-3
    )
    graph = onnx.load(tmp_path / "out" / "token.onnx", load_external_data=False).graph
    kinds = {i.name: (i.data_type, list(i.dims)) for i in graph.initializer}
    blocks = {n.output[0]: {a.name: a.i for a in n.attribute} for n in graph.node if n.op_type == "DequantizeLinear"}
    down, query = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert blocks[down] == {"axis": 0, "block_size": 32} and blocks[query] == {"axis": 0, "block_size": 128}
    assert kinds[f"{down}.codes"] == (TensorProto.INT4, [160, 256]) and kinds[f"{down}.scale"][1] == [5, 256]
