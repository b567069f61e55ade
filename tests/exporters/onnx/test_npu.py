"""The covered form on the emulated Hexagon NPU: every operation is taken, for every family, and none is wrong."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime_qnn", reason="the qnn extra, which holds the emulator, is not installed")

from optimum_mobilequant.exporters.htp import htp_session  # noqa: E402
from optimum_mobilequant.exporters.onnx import COVERED, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import cpu_session  # noqa: E402
from optimum_mobilequant.graph.executor import IntegerExecutor  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.exporters.onnx.test_forms import feeds_of  # noqa: E402
from tests.tiny import probe_ids  # noqa: E402

CASES = [
    ("llama-gqa", "w4a8"), ("llama-bias", "w4a8"), ("qwen2", "w8a8"), ("qwen3", "w8a16"), ("qwen3", "w8a8-full"),
    ("gemma", "w8a8"), ("stablelm", "w8a8"), ("stablelm", "w8a8-full"),
    ("qwen2", "w4a8+shift"), ("qwen3", "w8a8-full+shift"), ("stablelm", "w8a8+shift"), ("qwen2", "w8a16+shift"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_the_emulator_takes_every_operation_and_agrees(variant, preset, tmp_path):
    source = saved.source(variant, preset)
    with WeightStore(tmp_path / "model.data") as store:
        made = emit(source.graph, Layout.fixed(12, 16), COVERED, store, name="graph")
    onnx.save(made.model, tmp_path / "graph.onnx")
    ids = probe_ids(batch=1, length=12)
    feeds = feeds_of(source, made, ids)
    # htp_session refuses a graph of which any part would run on the CPU
    (found, keys), (expected, _) = (
        [codes.astype(float) for codes in session(tmp_path / "graph.onnx").run(["logits", "past_key_0_out"], feeds)]
        for session in (htp_session, cpu_session)
    )
    exact = IntegerExecutor.of(source.model).forward(ids).past[0][0].numpy()
    assert np.abs(keys[:, 0] - exact[0].swapaxes(1, 2)).max() <= 2, "keys of the first layer"
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean())
    # garbage is above 1; 8-bit presets differ by flipped codes, which random weights carry far
    assert error <= (0.02 if preset.startswith("w8a16") else 0.25)
