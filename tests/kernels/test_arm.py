"""The ARM kernels, compiled for and run on an emulated ARM machine where the tools for it are installed."""

import shutil
import subprocess

import pytest

from optimum_mobilequant.kernels.cpp import build as building

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
MAIN = """
extern "C" const char* mq_isa(int);
extern "C" int mq_self_check(int);
#include <stdio.h>
int main() {
  for (int i = 0; mq_isa(i); ++i)
    if (*mq_isa(i)) printf("%s %d\\n", mq_isa(i), mq_self_check(i));
}
"""


@pytest.mark.skipif(not COMPILER, reason="needs aarch64-linux-gnu-g++ (apt install g++-aarch64-linux-gnu)")
def test_neon_kernels_compute_what_the_portable_ones_do(tmp_path, monkeypatch):
    monkeypatch.setattr(building.platform, "machine", lambda: "aarch64")
    units = building.units()
    assert [unit.isa for unit in units] == ["neon", "generic"]
    objects = []
    for unit in units:
        macros = [f"-DMQ_ISA={unit.isa}_isa", f"-DMQ_{unit.isa.upper()}"]
        objects.append(compiled(tmp_path / f"{unit.isa}.o", "kernel.cpp", *unit.flags, *macros))
    objects.append(compiled(tmp_path / "dispatch.o", "dispatch.cpp", "-DMQ_HAVE_NEON"))
    (tmp_path / "main.cpp").write_text(MAIN, encoding="utf-8")
    program = tmp_path / "program"
    subprocess.run([COMPILER, "-static", tmp_path / "main.cpp", *objects, "-o", program], check=True)
    if not EMULATOR:
        pytest.skip("compiled; to run it takes qemu-aarch64-static (apt install qemu-user-static)")
    done = subprocess.run([EMULATOR, program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["neon", "1", "generic", "1"]


def compiled(out, source, *flags):
    flags = [*building._FLAGS, "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([COMPILER, *flags, "-c", building._HERE / source, "-o", out], check=True)
    return out
