"""The benchmarks run and keep their files; their numbers are not tested."""

import json
import runpy
import sys

import pytest
import torch

from tests import tiny


def test_quick_run(tmp_path, monkeypatch, capsys):
    script = tiny.ROOT / "benchmarks" / "kernels_cpu.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "k.json"), "--quick", "--threads", "1"])
    runpy.run_path(str(script), run_name="__main__")
    record = json.loads((tmp_path / "k.json").read_text())
    rows = record["rows"]
    base = [row for row in rows if row["contender"] == "torch bfloat16"]
    assert len(base) == 2 and all(row["ratio_of_least"] == 1 for row in base)
    assert {row["rows"] for row in rows} == {1, 16} and record["threads"] == torch.get_num_threads() == 1
    assert "| torch bfloat16 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists: give another --out"):
        runpy.run_path(str(script), run_name="__main__")


def test_layers(tmp_path, monkeypatch):
    script = tiny.ROOT / "benchmarks" / "cpu_layers.py"
    monkeypatch.syspath_prepend(script.parent)
    options = {"shape": "small", "layers": 1, "prompt": 8, "tokens": 4, "repeat": 1, "threads": 1}
    arguments = [item for name, value in options.items() for item in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--out", str(tmp_path / "l.json")])
    runpy.run_path(str(script), run_name="__main__")
    record = json.loads((tmp_path / "l.json").read_text())
    assert {"fp32", "bf16"} <= record["tokens_per_s"].keys() and record["vs_fp32"]["fp32"]["decode"] == 1
    for name in ("cpp", "onednn"):
        assert (name in record["tokens_per_s"]) == (f"{name} single" in record["vs_fp32"])
    assert {name: record[name] for name in options} == options
