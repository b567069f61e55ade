"""What this machine is, in the words of its system. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Instruction sets that decide how fast int8 and bfloat16 run on a CPU (x86 names, then ARM names).
_X86_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
CPU_FLAGS = (*_X86_FLAGS, "asimd", "asimddp", "i8mm", "sve")
_CPUINFO = Path("/proc/cpuinfo")


def cpu_name(source: Path = _CPUINFO) -> str:
    """The processor's name, or its kind where the system does not tell."""
    for line in _lines(source):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_flags(source: Path = _CPUINFO) -> list[str]:
    """The flags of ``CPU_FLAGS`` that the CPU has; empty where the system has no such file (macOS, Windows)."""
    for line in _lines(source):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return [flag for flag in CPU_FLAGS if flag in present]
    return []


def usable_cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _lines(source: Path) -> list[str]:
    return source.read_text(errors="replace").splitlines() if source.is_file() else []
