"""Run by the tests in a process of its own: what aimet-onnx makes of encodings files. It imports nothing from here.

``python aimet_check.py FOLDER`` reads ``model.onnx``, ``<version>.encodings`` and ``feeds.npz`` and writes
``found.npz`` (integer constants, logits of the simulator and of the QDQ model) and ``found.json``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from aimet_onnx.quantsim import QuantizationSimModel, encodings_to_onnx_qdq, load_encodings_to_sim

folder = Path(sys.argv[1])
feeds = dict(np.load(folder / "feeds.npz"))
versions = ("1.0.0", "0.6.1", "2.0.0")


def qdq_of(version):
    path = str(folder / f"{version}.encodings")
    return encodings_to_onnx_qdq(str(folder / "model.onnx"), path, prequantize_constants=True)


def contents(model):
    """Everything of a model that matters, in no order."""
    constants = {(t.name, t.data_type, onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer}
    return constants, {node.SerializeToString() for node in model.graph.node}


def run_qdq(model):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


def run_simulator(version):
    sim = QuantizationSimModel(
        onnx.load(folder / "model.onnx"),
        param_type="int4",
        activation_type="int16",
        config_file="htp_v73",
        providers=["CPUExecutionProvider"],
    )
    load_encodings_to_sim(sim, str(folder / f"{version}.encodings"), strict=False)
    return sim.session.run(None, feeds)[0]


models = {version: qdq_of(version) for version in versions}
first = models[versions[0]]
found = {
    f"code:{t.name[:-2]}": onnx.numpy_helper.to_array(t) for t in first.graph.initializer if t.name.endswith("_q")
}
found = {name: array.astype(np.int64) for name, array in found.items()}
found["qdq"] = run_qdq(first)
found |= {f"simulator:{version}": run_simulator(version) for version in versions}
np.savez(folder / "found.npz", **found)

refused = {}
for what, tampered in json.loads((folder / "tampered.json").read_text()).items():
    try:
        found = run_qdq(encodings_to_onnx_qdq(str(folder / "model.onnx"), tampered, prequantize_constants=True))
        refused[what] = found.tolist()
    except Exception as error:
        refused[what] = f"{type(error).__name__}: {error}"
alike = {version: contents(models[version]) == contents(first) for version in versions}
(folder / "found.json").write_text(json.dumps({"alike": alike, "tampered": refused}))
