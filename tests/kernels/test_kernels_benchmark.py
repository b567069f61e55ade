"""The benchmark runs and keeps its file; its numbers are not tested."""

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
