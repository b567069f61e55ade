"""An independent reader, aimet-onnx, gets our integers out of our encodings, and its simulator agrees with ours."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
if find_spec("aimet_onnx") is None:  # importing it here would take seconds
    pytest.skip("aimet-onnx is not installed (docs/qnn.md says how)", allow_module_level=True)

from optimum_mobilequant.exporters.encodings import encodings_dict, tensor_encodings  # noqa: E402
from optimum_mobilequant.exporters.onnx import FLOAT, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.types import code_array  # noqa: E402
from optimum_mobilequant.exporters.options import ENCODINGS_VERSIONS  # noqa: E402
from tests import tiny  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.graph.floating import decibels  # noqa: E402

LENGTH, CONTEXT = 12, 16


class Checked:
    """One model, written for aimet-onnx and read by it."""

    def __init__(self, preset, folder):
        import onnx

        self.source = saved.source("qwen2", preset)
        with WeightStore(folder / "model.data") as store:
            emitted = emit(self.source.graph, Layout.fixed(LENGTH, CONTEXT), FLOAT, store, name="prompt")
        onnx.save_model(emitted.model, folder / "model.onnx")
        self.records, self.encodings = emitted.records, tensor_encodings(emitted.records)
        for version in ENCODINGS_VERSIONS:
            (folder / f"{version}.encodings").write_text(json.dumps(encodings_dict(self.encodings, version)))
        (folder / "tampered.json").write_text(json.dumps(_tampered(encodings_dict(self.encodings))))
        self.ids = tiny.probe_ids(1, LENGTH)
        np.savez(folder / "feeds.npz", **self.feeds())
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("aimet_check.py")), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert (folder / "found.json").is_file(), done.stderr[-3000:]
        self.found = dict(np.load(folder / "found.npz"))
        self.said = json.loads((folder / "found.json").read_text())
        with torch.no_grad():
            self.simulated = self.source.model(input_ids=self.ids, use_cache=False).logits

    def feeds(self):
        facts, past = self.source.graph.facts, CONTEXT - LENGTH
        mask = next(e for e in self.encodings if e.name == "attention_mask")
        hidden = -mask.zero_point[0] * mask.scale[0]
        visible = np.concatenate([np.zeros((LENGTH, past), bool), np.tri(LENGTH, dtype=bool)], 1)
        cos, sin = (table[None, None].numpy() for table in self.source.rotary_tables(LENGTH))
        feeds = {"input_ids": self.ids.int().numpy(), "position_ids_cos": cos, "position_ids_sin": sin}
        feeds["attention_mask"] = np.where(visible, 0.0, hidden).astype(np.float32)[None, None]
        for i in range(facts["layers"]):
            for part, shape in (("key", (facts["head_dim"], past)), ("value", (past, facts["head_dim"]))):
                feeds[f"past_{part}_{i}_in"] = np.zeros((facts["kv_heads"], 1, *shape), np.float32)
        return feeds

    def agreement(self, logits):
        return decibels(self.simulated, torch.from_numpy(np.asarray(logits, np.float32)))


def _tampered(data):
    """Files that must not pass: no scale, and offsets with the other sign."""
    broken, turned = copy.deepcopy(data), copy.deepcopy(data)
    broken["activation_encodings"][5]["scale"] = [0.0]
    for entry in turned["activation_encodings"]:
        if entry["name"].endswith("up_proj.output"):
            entry["offset"] = [-(2 ** entry["bw"]) - offset + 90 for offset in entry["offset"]]
    return {"broken": broken, "turned": turned}


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def checked(request, tmp_path_factory):
    return Checked(request.param, tmp_path_factory.mktemp("aimet"))


def test_all_versions_become_the_same_graph(checked):
    assert checked.said["alike"] == dict.fromkeys(ENCODINGS_VERSIONS, True)


def test_its_integer_constants_are_ours(checked):
    graph, compared = checked.source.graph, 0
    for record in checked.records.values():
        if record.origin != "constant":
            continue
        codes = code_array(graph.constants[record.source](), graph.values[record.source].encoding)[1]
        ours = codes.T if record.axis == 1 else codes
        np.testing.assert_array_equal(checked.found[f"code:{record.name}"], ours.astype(np.int64), err_msg=record.name)
        compared += 1
    assert compared == len(graph.constants)


def test_its_graph_and_its_simulator_compute_what_our_simulation_computes(checked):
    assert checked.agreement(checked.found["qdq"]) > 25
    for version in ENCODINGS_VERSIONS:
        assert checked.agreement(checked.found[f"simulator:{version}"]) > 25
    for version in ENCODINGS_VERSIONS[1:]:
        np.testing.assert_array_equal(checked.found[f"simulator:{version}"], checked.found["simulator:1.0.0"])


def test_tampered_files_do_not_pass(checked):
    assert "scale" in checked.said["tampered"]["broken"]
    turned = checked.said["tampered"]["turned"]
    assert isinstance(turned, list), turned
    assert checked.agreement(turned) < checked.agreement(checked.found["qdq"]) - 5
