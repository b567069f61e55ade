"""The GPU kernels on the CPU, by Triton's interpreter: in a process of its own, for it is switched on by an import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

pytest.importorskip("triton", minversion="3.6", reason="the GPU kernels are written in Triton")


def test_the_kernels_in_the_interpreter():
    cases = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("MOBILEQUANT_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60 and "skipped" not in done.stdout, done.stdout[-500:]
