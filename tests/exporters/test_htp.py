"""Checkpoints on the emulated HTP, and context binaries for phones."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.exporters import phone

phone.require_emulator()

from optimum_mobilequant.exporters import export, htp  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import OnnxModel  # noqa: E402
from optimum_mobilequant.exporters.options import ExportOptions  # noqa: E402
from optimum_mobilequant.exporters.targets import QNN_HTP, soc_of  # noqa: E402

CONTEXT, CHUNK = 32, 8
SIZES = ExportOptions(context=CONTEXT, prompt_length=CHUNK)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """(folder, description) of the graphs of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("graphs")
    return folder, htp.write_htp_graphs(htp.open_for_htp(phone.checkpoint()), folder, SIZES)


def ids_of(length=20, seed=3):
    return torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def values(codes, encoding):
    return ((codes.to(torch.int64) - int(encoding.zero_point)) * float(encoding.scale)).numpy()


def cpu_logits(checkpoint, ids, folder):
    """The same graphs in ONNX Runtime on the CPU."""
    htp.write_htp_graphs(htp.open_for_htp(checkpoint), folder, SIZES)
    model = OnnxModel(folder)
    rows = []
    for row in ids.numpy():
        model.reset()
        rows.append(model.step(row).astype(np.int32))
    return values(torch.from_numpy(np.stack(rows)), model.logits_encoding)


@pytest.mark.parametrize(
    ("preset", "key_shift", "least"),
    [("w8a8", False, 25.0), ("w4a8", False, 25.0), ("w8a16", False, 40.0), ("w8a8", True, 25.0)],
)
def test_the_demo_model_agrees_with_onnx_runtime_on_the_cpu(preset, key_shift, least, tmp_path):
    from transformers import AutoTokenizer

    checkpoint = phone.demo_checkpoint(preset, key_shift=key_shift)
    text = "import os\nimport sys\n\n\ndef main(arguments):\n    for name in arguments:\n        print(name)\n"
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"][:CONTEXT]])
    runner = htp.HtpRunner(checkpoint, context=CONTEXT, prompt_length=CHUNK)
    found, expected = values(runner(ids), runner.encoding), cpu_logits(checkpoint, ids, tmp_path)
    assert found.shape == (1, ids.shape[1], 2048)
    assert phone.decibels(expected, found) >= least
    # the same numbers for other tokens are nowhere near: the measure can tell
    assert phone.decibels(expected, values(runner(ids.flip(1)), runner.encoding)) < 5.0


def test_sequences_of_a_batch_do_not_see_each_other():
    runner = htp.HtpRunner(phone.checkpoint(), context=CONTEXT, prompt_length=CHUNK)
    first, second = ids_of(seed=4), ids_of(seed=5)
    together = runner(torch.cat([first, second]))
    assert together.dtype == torch.int32
    assert torch.equal(together[:1], runner(first)) and torch.equal(together[1:], runner(second))
    with pytest.raises(ValueError, match="context of 32"):
        runner(ids_of(length=CONTEXT + 1))


def test_codes_are_those_of_the_checkpoints_own_grid():
    runner = htp.HtpRunner(phone.checkpoint(), context=CONTEXT, prompt_length=CHUNK)
    graph = htp.open_for_htp(phone.checkpoint()).graph
    assert runner.encoding.same_as(graph.values[graph.outputs[0]].encoding)


@pytest.mark.parametrize("soc", sorted(QNN_HTP.socs))
def test_a_binary_is_compiled_for_every_chip_that_is_named(soc, graphs, tmp_path):
    folder, about = graphs
    built = htp.build_contexts({"token": folder / about["token"]["file"]}, tmp_path, soc)["token"]
    assert built.binary.stat().st_size > 10_000
    htp.check_reload(built, soc, about["token"])


def test_a_binary_for_another_chip_or_of_another_graph_is_noticed(graphs, tmp_path):
    folder, about = graphs
    built = htp.build_contexts({"token": folder / about["token"]["file"]}, tmp_path, "sm8650")["token"]
    htp._check_chip(built.binary, soc_of("sm8650"))
    with pytest.raises(RuntimeError, match="not compiled for sm8750"):
        htp._check_chip(built.binary, soc_of("sm8750"))
    with pytest.raises(RuntimeError, match="other inputs.*attention_mask"):
        htp.check_reload(built, "sm8650", about["prompt"])
    other = dataclasses.replace(built, wrapper=folder / about["token"]["file"])
    with pytest.raises(RuntimeError, match="holds 0 compiled parts"):
        htp._binary_of(other.wrapper)


def test_a_shared_binary_holds_the_weights_once(graphs, tmp_path):
    folder, about = graphs
    models = {name: folder / about[name]["file"] for name in ("prompt", "token")}
    (single := tmp_path / "single").mkdir()
    (shared := tmp_path / "shared").mkdir()
    apart = htp.build_contexts(models, single, "sm8650")
    together = htp.build_contexts(models, shared, "sm8650", shared=True)
    assert together["prompt"].binary == together["token"].binary
    assert apart["prompt"].binary != apart["token"].binary
    assert len(list(shared.glob("*.bin"))) == 1
    assert together["prompt"].binary.stat().st_size < sum(item.binary.stat().st_size for item in apart.values())


def test_a_graph_without_conversions_is_refused(tmp_path):
    export(phone.checkpoint(), "onnx", tmp_path / "plain", context=CONTEXT, prompt_length=CHUNK)
    with pytest.raises(RuntimeError, match="token.onnx for sm8650: an operation of the graph does not run"):
        htp.htp_session(tmp_path / "plain" / "token.onnx")


def test_what_the_htp_cannot_multiply_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="must be symmetric"):
        htp.HtpRunner(phone.checkpoint(preset="w4a8-asym"), context=CONTEXT, prompt_length=CHUNK)


def test_floats_are_refused():
    source = htp.open_for_htp(phone.checkpoint())
    name = next(name for name in source.graph.values if name.endswith("q_proj.output"))
    source.graph.values[name] = dataclasses.replace(source.graph.values[name], encoding=None)
    with pytest.raises(ValueError, match="no static encoding"):
        htp.refuse_floats(source.graph)


def test_an_unknown_chip_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="sm8650"):
        htp.htp_session(tmp_path / "none.onnx", "sm9999")


def test_a_machine_without_emulator_and_a_missing_package_are_told(monkeypatch):
    check = htp.require_emulator.__wrapped__
    with monkeypatch.context() as changed:
        changed.setattr(htp.platform, "machine", lambda: "aarch64")
        with pytest.raises(RuntimeError, match="Linux x86-64, not on linux aarch64"):
            check()
    with monkeypatch.context() as changed:
        changed.setattr("optimum_mobilequant.exporters.options.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r'pip install "optimum-mobilequant\[qnn\]"'):
            check()


def test_standard_output_stays_clean(graphs, capfd):
    folder, about = graphs
    htp.htp_session(folder / about["token"]["file"], "sm8550")
    assert capfd.readouterr().out == ""
    print(json.dumps({"a": 1}))  # and it works afterwards
    assert capfd.readouterr().out == '{"a": 1}\n'
