"""export(): what it refuses, that it is all or nothing, and the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("onnx", reason="the onnx extra is not installed")

from optimum_mobilequant import cli  # noqa: E402
from optimum_mobilequant.exporters import EXPORTERS, Exporter, ExportResult, export, options  # noqa: E402
from optimum_mobilequant.exporters.source import resolve_options  # noqa: E402
from tests import tiny  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402


def listing(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_the_result_lists_every_file(tmp_path):
    result = export(saved.checkpoint(), "onnx", tmp_path / "out", context=16, prompt_length=4)
    assert result.path == tmp_path / "out" and result.target == "onnx"
    assert sorted(result.files) == listing(tmp_path / "out") == [
        "export.json", "graphs.json", "memory_plan.json", "model.data", "names.json", "prompt.onnx",
        "rotary.safetensors", "token.onnx",
    ]  # fmt: skip
    assert result.files["model.data"] == (tmp_path / "out" / "model.data").stat().st_size
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["target"] == "onnx" and record["options"]["context"] == 16
    plan = json.loads((tmp_path / "out" / "memory_plan.json").read_text())
    assert [p["sizes"] for p in plan["placed"]] == [
        {"batch": 1, "sequence": 4, "past": 12}, {"batch": 1, "sequence": 1, "past": 15},
    ]  # fmt: skip
    prompt, token = plan["placed"]
    assert result.summary["arena_bytes"] == {"prompt": prompt["arena_bytes"], "token": token["arena_bytes"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 65}, "context 65 is more than the model's 64 positions: give at most 64"),
        ({"context": 16, "prompt_length": 16}, "prompt length 16 must be at least 1 and below the context of 16"),
        ({"encodings_version": "3.0"}, "encodings version '3.0' is unknown; known: 1.0.0"),
        ({"context": 1}, "context 1 is too short"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export(saved.checkpoint(), "onnx", tmp_path / "out", **changes)
    assert listing(tmp_path) == []


def test_default_sizes_follow_the_model():
    found = resolve_options(saved.checkpoint())
    assert (found.context, found.prompt_length) == (64, 32)
    assert resolve_options(saved.checkpoint(), context=50).prompt_length == 25


def test_an_attention_window_limits_the_context(tmp_path):
    model = tiny.build("mistral", sliding_window=24)
    from optimum_mobilequant import quantize

    quantize(model, None, tiny.config()).save_pretrained(tmp_path / "windowed")
    assert resolve_options(tmp_path / "windowed").context == 24
    with pytest.raises(ValueError, match="context 32 is more than the model's 24 tokens in its attention window"):
        export(tmp_path / "windowed", "onnx", tmp_path / "out", context=32)


def test_other_checkpoints_are_refused(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is a float model: give a checkpoint that `mobilequant quantize` saved"):
        export(tmp_path / "float", "onnx", tmp_path / "out")
    shutil.copytree(saved.checkpoint(), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gptq"):
        export(tmp_path / "other", "onnx", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export(tmp_path / "nowhere", "onnx", tmp_path / "out")
    with pytest.raises(ValueError, match='export target "tflite" is unknown; known: onnx, qnn'):
        export(saved.checkpoint(), "tflite", tmp_path / "out")
    assert "out" not in listing(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), -0.01, 0.0])
def test_a_tampered_scale_is_refused_and_leaves_nothing(tmp_path, value):
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved.checkpoint(), folder)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.scores.scale"] = torch.tensor(value)
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(ValueError, match="model.layers.1.self_attn.scores.scale .* is not finite and positive"):
        export(folder, "onnx", tmp_path / "out")
    assert listing(tmp_path) == ["checkpoint"]


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    found = options.find_spec
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(ImportError, match=r'onnx missing: pip install "optimum-mobilequant\[onnx\]"'):
        export(saved.checkpoint(), "onnx", tmp_path / "out")
    assert listing(tmp_path) == []


def test_an_output_in_use_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite, message in ((False, "is not empty"), (True, "holds no export")):
        with pytest.raises(ValueError, match=message):
            export(saved.checkpoint(), "onnx", out, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        export(saved.checkpoint(), "onnx", out / "thesis.txt")
    with pytest.raises(ValueError, match="lie in each other"):
        export(saved.checkpoint(), "onnx", saved.checkpoint() / "onnx")
    assert listing(out) == ["thesis.txt"] and listing(tmp_path) == ["out"]


def fake(monkeypatch, run, **more):
    """A target "fake" that calls ``run``."""
    monkeypatch.setitem(EXPORTERS, "fake", Exporter("onnx", "export_fake", None, (), "for tests", **more))
    monkeypatch.setattr(Exporter, "load", lambda self: run)


def test_an_error_or_an_interrupt_leaves_the_old_export(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def finish(checkpoint, folder, _):
        (folder / "new").write_text("whole")
        return ExportResult.of("fake", folder, {})

    for error in (RuntimeError("full disk"), KeyboardInterrupt()):

        def fail(checkpoint, folder, _, error=error):
            (folder / "half").write_text("h")
            raise error

        fake(monkeypatch, fail)
        with pytest.raises(type(error)):
            export(saved.checkpoint(), "fake", out)
        assert listing(tmp_path) == []
    fake(monkeypatch, finish)
    export(saved.checkpoint(), "fake", out)
    with pytest.raises(ValueError, match="is not empty"):
        export(saved.checkpoint(), "fake", out)
    fake(monkeypatch, fail)
    with pytest.raises(KeyboardInterrupt):
        export(saved.checkpoint(), "fake", out, overwrite=True)
    assert listing(out) == ["export.json", "new"] and listing(tmp_path) == ["out"]
    fake(monkeypatch, finish)
    (out / "old").write_text("o")
    export(saved.checkpoint(), "fake", out, overwrite=True)
    assert listing(out) == ["export.json", "new"] and listing(tmp_path) == ["out"]


def test_a_target_that_resumes_works_in_its_folder(tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []

    def step(checkpoint, folder, _):
        """Begins, fails, finishes."""
        calls.append(listing(folder))
        if len(calls) == 1:
            raise ValueError("no account")
        (folder / "jobs.json").write_text("[]")
        if len(calls) == 2:
            raise ConnectionError("gone")
        return ExportResult.of("fake", folder, {"finished": len(calls) > 3})

    fake(monkeypatch, step, resumes="jobs.json")
    with pytest.raises(ValueError, match="no account"):
        export(saved.checkpoint(), "fake", out)
    assert listing(tmp_path) == []  # nothing was begun, so nothing is left
    with pytest.raises(ConnectionError):
        export(saved.checkpoint(), "fake", out)
    assert listing(out) == ["jobs.json"]
    export(saved.checkpoint(), "fake", out)
    assert listing(out) == ["jobs.json"]  # not finished: no record
    export(saved.checkpoint(), "fake", out)
    assert listing(out) == ["export.json", "jobs.json"]
    assert calls == [[], [], ["jobs.json"], ["jobs.json"]]
    export(saved.checkpoint(), "fake", out, overwrite=True)
    assert calls[-1] == []  # began anew


def test_the_command_writes_and_reports(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(saved.checkpoint()), "--to", "onnx", "--out", str(out), "--context", "16"]
    assert cli.main([*arguments, "--prompt-length", "4", "--dynamic", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "onnx" and sorted(report["files"]) == listing(out)
    assert "model_dynamic.onnx" in report["files"] and report["summary"]["context"] == 16
    assert cli.main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert "model_dynamic.onnx" not in listing(out)
    text = capsys.readouterr().out
    assert "prompt.onnx" in text and f"saved {out}" in text


def test_the_command_names_the_targets(capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, exporter in EXPORTERS.items():
        assert name in text
        assert exporter.summary.split(" ")[0] in text
    assert cli.main(["export", "no/where", "--to", "onnx", "--out", "x"]) == 2
    assert "export reads a checkpoint saved on this machine" in capsys.readouterr().err
