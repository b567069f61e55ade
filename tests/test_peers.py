"""The table of other libraries: what a worker is given, what is refused, what is not measured again.

The workers here need no other library; those of ``benchmarks/peers`` are run by whoever measures.
"""

import hashlib
import importlib
import json
import shutil
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from optimum_mobilequant.data.sequences import calibration_data
from tests import tiny
from tests.test_benchmarks import folder  # noqa: F401  (a fixture: a small model and two texts)

WORKER = '''
"""Rounds to nearest, or does not."""
import torch
from common import Quantized, main, projections

@torch.no_grad()
def rounded(model, job):
    layers = projections(model)
    for layer in layers.values():
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / (2 ** (job.weight_bits - 1) - 1)
        layer.weight.copy_((layer.weight / scale).round() * scale)
    return Quantized(model, {path: layer.weight for path, layer in layers.items()}, 0)

def untouched(model, job):
    return Quantized(model, {path: layer.weight for path, layer in projections(model).items()}, 0)

if __name__ == "__main__":
    main({"rounded": rounded, "untouched": untouched})
'''
FOUND = {
    "float_perplexity": 4.0, "perplexity": 4.4, "seconds": 60.0, "cpu_seconds": 50.0,
    "levels": 16, "layers": 7, "activations": 7, "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
    return importlib.import_module("peers")


@pytest.fixture
def fake(peers, folder, monkeypatch, tmp_path):  # noqa: F811
    """Runs the benchmark with one other library, whose environment is this one; returns the file's content."""
    workers = tmp_path / "workers"
    workers.mkdir()
    shutil.copy(tiny.ROOT / "benchmarks" / "peers" / "common.py", workers)
    for library, worker in (("fake-lib", WORKER), ("lacking-lib", 'raise ValueError("not offered")')):
        (workers / f"worker_{library.replace('-', '_')}.py").write_text(worker)
        (workers / f"{library}.txt").write_text("")
        python = tmp_path / "envs" / library / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (python.parents[1] / "requirements.sha256").write_text(hashlib.sha256(b"").hexdigest())
    methods = [peers.Method("fake-lib", "rounded", "IN"), peers.Method("lacking-lib", "missing", "IN")]
    monkeypatch.setattr(peers, "WORKERS", workers)
    monkeypatch.setattr(peers, "METHODS", (*methods, peers.Method(peers.OURS, "rtn", "ALL")))
    monkeypatch.chdir(folder)

    def call(*options):
        command = ["peers.py", "--out", tmp_path / "peers.json", "--envs", tmp_path / "envs", "--models", "models"]
        command += ["--text", "small=calibration.txt,evaluation.txt,1000", "--seq-len", 32, "--quick", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        peers.main()
        return json.loads((tmp_path / "peers.json").read_text())

    return call


def test_rows_of_all_libraries_are_scored_alike_and_not_measured_again(fake, capsys, tmp_path):
    first = fake("--only", "small/w4a8/*/r*")
    rows = {row["library"]: row for row in first["rows"] if row["preset"] == "w4a8"}
    assert len(first["rows"]) == 3 and all(row["perplexity"] > 1 for row in first["rows"])
    theirs = rows["fake-lib"]
    assert (theirs["levels"], theirs["layers"], theirs["activations"]) == (15, 7, 0)
    assert theirs["versions"]["torch"] == metadata.version("torch") and theirs["cpu_seconds"] > 0
    assert str(tmp_path) not in json.dumps(first)

    with pytest.raises(SystemExit, match="--append"):
        fake()
    second = fake("--append", "--only", "small/w4a8/*-lib/*")
    assert second["rows"][:3] == first["rows"]
    assert [(row["method"], row["error"]) for row in second["rows"][3:]] == [("missing", "ValueError: not offered")]
    printed = capsys.readouterr().out
    assert "| small | w4a8 | lacking-lib | missing | IN | refused | ValueError: not offered |" in printed
    assert "| W4A8 | lacking-lib | missing | IN | refused |" in printed


def test_our_own_rows_may_be_those_of_the_ladder(fake, peers, folder, tmp_path):  # noqa: F811
    text = peers.Text("calibration.txt", "evaluation.txt", 1000).record()
    settings = {"effort": "default", "seq_len": 32, "quick": True, "factor": 30.0, "share": 0.03}
    values = {"model": "small", "perplexity": 5.0, "gap": 0.25, "minutes": 1.0, "extras": {}, "error": None, "run": 0}
    others = [("injected", "w4a8", "rtn", 0), ("plain", "w4a8", "rtn", 1), ("plain", "w4a8", "qad", 0)]
    rows = [
        values | dict(zip(("variant", "preset", "recipe", "seed"), key, strict=True))
        for key in [("plain", "float32", "float", 0), *others, ("plain", "w4a8", "rtn", 0)]
    ]
    for number, row in enumerate(rows):
        row["gap"] = 0.25 + number
    content = {"settings": settings, "runs": [{"date": "then"}], "texts": {"small": text}, "rows": rows}
    ladder = tmp_path / "ladder.json"
    ladder.write_text(json.dumps(content))
    (row,) = fake("--reuse", ladder, "--only", f"small/w4a8/{peers.OURS}/*")["rows"]
    assert (row["method"], row["scheme"], row["gap"]) == ("rtn", "ALL", 4.25)
    assert (row["from"], row["measured"]) == ("ladder.json", "then")
    ladder.write_text(json.dumps(content | {"settings": settings | {"seq_len": 64}}))
    with pytest.raises(SystemExit, match="other settings .seq_len."):
        fake("--append", "--reuse", ladder)
    changed = {"small": text | {"evaluation_sha256": "0"}}
    ladder.write_text(json.dumps(content | {"texts": changed}))
    (tmp_path / "peers.json").unlink()
    measured = fake("--reuse", ladder, "--only", f"small/w4a8/{peers.OURS}/*")["rows"]
    assert len(measured) == 2 and "from" not in measured[1] and measured[1]["gap"] != 4.25


def test_a_worker_scores_before_and_after_and_counts_levels(folder, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks" / "peers")
    common = importlib.import_module("common")
    namespace = {"__name__": "worker"}
    exec(WORKER, namespace)
    ids = torch.randint(96, (4, 32))
    model = folder / "models" / "small"
    found = {
        (name, bits): common.work(namespace[name], common.Job(model, ids, ids, name, bits, 8, 0, tmp_path))
        for name, bits in (("rounded", 4), ("rounded", 8), ("untouched", 8))
    }
    same = found["untouched", 8]
    assert same["perplexity"] == same["float_perplexity"] and same["levels"] > 16
    before, coarse, fine = same["perplexity"], found["rounded", 4], found["rounded", 8]
    assert 0 < abs(fine["perplexity"] - before) < abs(coarse["perplexity"] - before)
    assert coarse["levels"] == 15 and fine["levels"] > 16


def test_the_overview_marks_the_smallest_gap_of_each_model(peers):
    rows = [
        {"model": model, "preset": preset, "library": library, "method": "m", "scheme": "IN", "gap": gap}
        for model, preset, library, gap in (
            ("a", "float32", "x", 0.0), ("a", "w4a8", "x", 0.02), ("a", "w4a8", "y", 0.03), ("b", "w4a8", "y", 0.01),
            ("b", "w8a8", "y", None),
        )
    ]  # fmt: skip
    assert peers.overview(rows).splitlines()[2:] == [
        "| W4A8 | x | m | IN | **2.00 %** | — |",
        "| W4A8 | y | m | IN | 3.00 % | **1.00 %** |",
        "| W8A8 | y | m | IN | — | refused |",
    ]


def test_workers_get_the_sequences_of_our_own_run_and_the_chunks_we_score(peers, folder, tmp_path):  # noqa: F811
    args = {"seq_len": 32, "quick": True, "effort": "light", "seed": 0, "factor": 1.0, "share": 0.0}
    args = SimpleNamespace(**args)
    text = peers.Text(str(folder / "calibration.txt"), str(folder / "evaluation.txt"), 1000)
    subject = peers.Subject(folder / "models" / "small", text, args)
    paths = peers.hand_over(subject, tmp_path, args)
    given = np.load(paths["calibration"])
    data = calibration_data(text.calibration, subject.tokenizer, samples=8, seq_len=32, seed=0, bos=False)
    assert np.array_equal(given, torch.cat([data.train, data.validation]))
    ids = subject.tokenizer(text.read(), add_special_tokens=False)["input_ids"]
    assert np.load(paths["evaluation"]).flatten().tolist() == ids[: len(ids) // 32 * 32]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({}, None),
        ({"float_perplexity": 4.0 + 2e-4}, "the float model has perplexity 4.00020 there, 4.00000 here"),
        ({"levels": 17}, "a weight has 17 levels in an output channel"),
        ({"perplexity": float("nan")}, "the perplexity is not finite"),
    ],
)
def test_what_a_worker_found_is_judged(peers, changed, error):
    row = peers.judged(FOUND | changed, 4.0, 4)
    assert row["error"] == error and row["versions"] == {"torch": "2"}
    assert row["gap"] == (None if error else pytest.approx(0.1)) and (row["perplexity"] is None) == bool(error)


def test_a_worker_is_stopped_with_all_it_started_when_its_time_is_up(peers, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.raises(peers.WorkerError, match="stopped after 0.05 minutes"):
        peers.run_worker(sys.executable, worker, {}, tmp_path, 3)
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_an_environment_is_made_once_for_its_requirements(peers, monkeypatch, tmp_path):
    commands, method = [], peers.Method("torchao", "static", "IN")
    assert method.requirements.is_file() and method.worker.is_file()

    def record(command):
        commands.append(command)
        (tmp_path / "torchao").mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(peers.subprocess, "run", record)
    python = peers.environment(tmp_path, method)
    assert python == peers.environment(tmp_path, method) == tmp_path / "torchao" / "bin" / "python"
    assert len(commands) == 2 and "venv" in commands[0] and "--no-deps" in commands[1]
    monkeypatch.setattr(peers, "WORKERS", tmp_path)
    (tmp_path / "torchao.txt").write_text("torch==0\n")
    peers.environment(tmp_path, method)
    assert len(commands) == 4


def test_every_library_has_a_worker_and_pinned_requirements_without_cuda(peers):
    for method in peers.METHODS:
        if method.library != peers.OURS:
            assert method.worker.is_file(), method
            lines = method.requirements.read_text(encoding="utf-8").splitlines()
            packages = [line for line in lines if line and not line.startswith("#")]
            assert all("==" in line for line in packages) and not any(line.startswith("nvidia-c") for line in packages)
            assert any(line.startswith("torch==") for line in packages)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_of_a_weight_are_counted(monkeypatch, bits):
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks" / "peers")
    levels = importlib.import_module("common").levels
    grid = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    weight = torch.stack([grid[torch.randint(len(grid), (4096,))] for _ in range(3)]) * torch.tensor(
        [[1e-3], [1], [9]]
    )
    assert levels(weight * 1.7 / 1.3) == 2**bits
    assert levels(weight + 1e-3 * torch.rand_like(weight) * weight.abs().amax()) > 2**bits


def test_the_page_shows_the_results_file(peers):
    stored = json.loads((tiny.ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))
    page = (tiny.ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    shown = page.split("<!-- peers: begin -->")[1].split("<!-- peers: end -->")[0]
    assert peers.overview(stored["rows"]) in shown, "see the page for the command that prints the table"
