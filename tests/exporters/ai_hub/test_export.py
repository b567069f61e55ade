"""The ``ai-hub`` target on a checkpoint: from the saved model to results that are judged by the integer executor.

The qnn target's part is a stand-in here (folders with the model's own inputs and outputs), except in the last test.
"""

import importlib.util
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

pytest.importorskip("qai_hub", reason='no client of AI Hub: pip install "optimum-mobilequant[ai-hub]"')

from optimum_mobilequant import cli, quantize
from optimum_mobilequant.exporters import export as common_export
from optimum_mobilequant.exporters.ai_hub import export_ai_hub
from optimum_mobilequant.exporters.ai_hub import run as run_module
from optimum_mobilequant.exporters.options import Exporter, ExportOptions
from optimum_mobilequant.exporters.source import open_checkpoint
from optimum_mobilequant.graph.executor import IntegerExecutor
from tests import tiny
from tests.exporters.ai_hub.conftest import tensor
from tests.exporters.ai_hub.service import PHONE

OPTIONS = ExportOptions(context=8, prompt_length=4, device=PHONE, wait=True)
GRAPHS = {"prompt_ar4_cl8": 4, "token_ar1_cl8": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    quantize(tiny.build("llama-gqa"), None, tiny.config("w8a8", recipe="rtn")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def executor(checkpoint):
    return IntegerExecutor.of(open_checkpoint(checkpoint).model)


def replace_qnn(monkeypatch, function):
    load = Exporter.load
    monkeypatch.setattr(Exporter, "load", lambda self: function if self.function == "export_qnn" else load(self))


@pytest.fixture
def stand_in(monkeypatch, executor):
    """In place of the qnn target: folders as it writes them, with the logits' real encoding. Counts its calls."""
    calls = []
    encoding = executor.graph.values[executor.graph.outputs[0]].encoding
    vocabulary = executor.graph.facts["vocabulary"]

    def export_qnn(source, out, options):
        calls.append(source)
        graphs = {}
        for name, new in GRAPHS.items():
            (out / f"{name}.aimet").mkdir()
            for suffix in ("onnx", "data", "encodings"):
                (out / f"{name}.aimet" / f"model.{suffix}").write_text(f"{name} {suffix}")
            inputs = [
                tensor("input_ids", [1, new], "int32"),
                tensor("attention_mask", [1, 1, new, 8], "uint16", 50 / 65535, 65535),
                tensor("position_ids_cos", [1, 1, new, 4], "uint16", 2.0**-14, 32768),
                tensor("position_ids_sin", [1, 1, new, 4], "uint16", 2.0**-14, 32768),
            ]
            logits = tensor("logits", [1, new, vocabulary], "uint16", float(encoding.scale), int(encoding.zero_point))
            graphs[name] = {"inputs": inputs, "outputs": [logits]}
        (out / "io_spec.json").write_text(json.dumps({"format_version": 1, "graphs": graphs}))

    replace_qnn(monkeypatch, export_qnn)
    monkeypatch.setattr(run_module, "POLL_SECONDS", 0.01)
    return calls


@pytest.fixture
def phone_computes(service, executor):
    """The device computes what the executor does, so their results must agree to the last bit."""

    def device(graph, fed):
        codes = executor.forward(torch.from_numpy(fed["input_ids"].astype(np.int64))).logits
        return {"logits": codes.numpy().astype(np.uint16)}

    service.device = device
    return device


@pytest.fixture
def export(checkpoint, tmp_path, service, configure, stand_in):
    configure(service.url)

    def call(**changes):
        return export_ai_hub(checkpoint, tmp_path / "result", replace(OPTIONS, **changes))

    return call


def test_a_checkpoint_goes_all_the_way(export, phone_computes, tmp_path):
    result = export()
    assert result.target == "ai-hub" and result.summary["finished"] and "continue" not in result.summary
    assert {"ai_hub_jobs.json", "model.bin", "qnn/io_spec.json"} <= result.files.keys()
    assert result.summary["device"]["hexagon"] == "v75"
    assert {job["state"] for job in result.summary["jobs"].values()} == {"SUCCESS"}
    for graph in GRAPHS:
        judged = result.summary["graphs"][graph]["against_executor"]
        assert judged == {"compared": True, "sqnr_db": None, "same_choice": 1.0, "largest_difference": 0.0}
    assert result.summary["checked"].startswith(
        f"logits on {PHONE} against the integer executor: prompt_ar4_cl8 equal,"
    )
    json.dumps(result.summary)


def test_a_device_that_computes_something_else_is_seen(export, service, phone_computes):
    def off_by_two(graph, fed):
        codes = phone_computes(graph, fed)["logits"].astype(np.int64)
        return {"logits": np.clip(codes + 2 * (codes % 2), 0, 65535).astype(np.uint16)}

    service.device = off_by_two
    judged = export().summary["graphs"]["prompt_ar4_cl8"]["against_executor"]
    assert judged["largest_difference"] == pytest.approx(2) and 20 < judged["sqnr_db"] < 90


def test_outputs_that_cannot_be_compared_are_not(export):
    result = export()  # the service's own device has 8 tokens in its vocabulary
    about = result.summary["graphs"]["prompt_ar4_cl8"]
    assert about["against_executor"] == {"compared": False} and about["output_differences"]
    assert "checked" not in result.summary


def test_samples_are_the_models_own(export, executor, tmp_path):
    export(wait=False)
    feeds = load_file(tmp_path / "result" / "inputs_prompt_ar4_cl8.safetensors")
    cos, sin, _ = executor.inputs(torch.zeros(1, 4, dtype=torch.int64))
    for name, table in (("cos", cos), ("sin", sin)):
        assert (feeds[f"position_ids_{name}"].astype(np.int64) - 32768 == table.numpy()).all()
    assert len(set(feeds["input_ids"][0].tolist())) > 1


def test_the_command_that_continues(export, service, stand_in, tmp_path, phone_computes):
    first = export(wait=False)
    assert not first.summary["finished"]
    command = first.summary["continue"]
    assert command.startswith("mobilequant export ") and f"--device '{PHONE}'" in command
    assert f"--out {tmp_path / 'result'}" in command
    assert cli.main(shlex.split(command)[1:]) == 0
    assert len(stand_in) == 1  # the folders are not made again
    assert service.counts["POST jobs"] == 5
    before = service.counts.copy()
    assert (tmp_path / "result" / "export.json").is_file()
    assert export().summary["finished"]
    assert service.counts == before  # a finished folder asks for nothing


def test_through_the_common_entry(checkpoint, tmp_path, service, configure, stand_in, phone_computes):
    configure(service.url)

    def call(**options):
        sizes = {"context": 8, "prompt_length": 4, "device": PHONE}
        return common_export(checkpoint, "ai-hub", tmp_path / "result", **sizes | options)

    assert not call().summary["finished"]
    assert not (tmp_path / "result" / "export.json").exists()  # which marks what is complete
    assert call(wait=True).summary["finished"]
    assert (tmp_path / "result" / "export.json").is_file()
    assert service.counts["POST jobs"] == 5
    service.fail["link_job"] = "no"
    with pytest.raises(RuntimeError, match="link job failed: no"):
        call(wait=True, overwrite=True)
    service.fail.clear()
    with pytest.raises(RuntimeError, match=r"link job failed: no.*start anew \(overwrite\)"):
        call(wait=True)
    with pytest.raises(ValueError, match="no device"):  # and what is there stays
        call(wait=True, overwrite=True, device="Nokia")
    assert (tmp_path / "result" / "ai_hub_jobs.json").is_file()
    assert call(wait=True, overwrite=True).summary["finished"]
    assert service.counts["POST jobs"] == 15


def test_nothing_is_exported_without_account_or_device(export, service, stand_in, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no device 'Samsung Galaxy S24'.*similar"):
        export(device="Samsung Galaxy S24")
    with pytest.raises(ValueError, match="needs a device"):
        export(device=None)
    monkeypatch.setenv("QAIHUB_CLIENT_INI", "/nonexistent.ini")
    with pytest.raises(FileNotFoundError, match="qai-hub configure"):
        export()
    assert not stand_in and not service.models
    assert not (tmp_path / "result").exists()


def test_a_float_model_is_refused_before_any_request(tmp_path, service, configure, stand_in):
    configure(service.url)
    tiny.build("llama-gqa").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="float"):
        export_ai_hub(tmp_path / "float", tmp_path / "result", OPTIONS)
    assert not service.counts and not (tmp_path / "result").exists()


def test_another_checkpoint_or_size_is_refused(export, checkpoint, tmp_path, stand_in):
    export(wait=False)
    with pytest.raises(ValueError, match=r"changed: qnn\.context"):
        export(context=16)
    with pytest.raises(ValueError, match=r"changed: asked_device"):
        export(device="Samsung Galaxy S25 (Family)")
    other = tmp_path / "other"
    quantize(tiny.build("llama-gqa"), None, tiny.config("w4a8", recipe="rtn")).save_pretrained(other)
    with pytest.raises(ValueError, match=r"changed: checkpoint"):
        export_ai_hub(other, tmp_path / "result", OPTIONS)
    assert len(stand_in) == 1


def test_a_failed_qnn_export_leaves_nothing_that_looks_whole(export, stand_in, monkeypatch, tmp_path):
    def broken(source, out, options):
        (out / "io_spec.json").write_text("{}")
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        replace_qnn(patch, broken)
        with pytest.raises(RuntimeError, match="disk"):
            export()
    assert not (tmp_path / "result" / "qnn").exists()
    assert not (tmp_path / "result" / "ai_hub_jobs.json").exists()
    assert not export(wait=False).summary["finished"]


@pytest.mark.skipif(
    importlib.util.find_spec("optimum_mobilequant.exporters.qnn") is None, reason="the qnn target is not there"
)
def test_with_the_real_qnn_target(checkpoint, tmp_path, service, configure, phone_computes, monkeypatch):
    pytest.importorskip("onnx", reason='pip install "optimum-mobilequant[onnx]"')
    monkeypatch.setattr(run_module, "POLL_SECONDS", 0.01)
    configure(service.url)
    result = export_ai_hub(checkpoint, tmp_path / "result", OPTIONS)
    assert result.summary["finished"]
    for graph in GRAPHS:
        assert result.summary["graphs"][graph]["against_executor"]["sqnr_db"] is None
        (sent,) = [job for job in service.jobs_of("compile_job") if graph in job.compile_job.options]
        assert "past_value_1_out" in sent.compile_job.options
