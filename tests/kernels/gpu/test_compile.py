"""Kernels compiled for compute capability 8.0, 8.9 and 9.0 without a GPU: instructions, spills, shared memory.

By default some rows of the table; ``MOBILEQUANT_COMPILE_ALL=1`` compiles every one (minutes).
"""

import os

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the GPU kernels are written in Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from optimum_mobilequant.kernels.gpu import configs  # noqa: E402
from tests.kernels.gpu.compiling import check, compile_row, rows  # noqa: E402

FULL = os.environ.get("MOBILEQUANT_COMPILE_ALL") == "1"


@pytest.mark.parametrize(("arch", "kind", "config"), rows(FULL))
def test_rows_of_the_table(arch, kind, config):
    check(compile_row(arch, kind, config), arch, kind, config)


def test_the_check_sees_spills_and_other_instructions():
    crowded = configs.Config(64, 128, 1, 2)
    found = compile_row("sm80", "w8a8", crowded)
    assert found.spills > 0
    with pytest.raises(AssertionError):
        check(found, "sm80", "w8a8", crowded)
    found.sass = "no spills"
    check(found, "sm80", "w8a8", crowded)
    with pytest.raises(AssertionError, match="s32"):
        check(found, "sm80", "w4", crowded)
