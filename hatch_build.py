"""Tags a wheel for this platform when compiled kernels lie in the package (``optimum_mobilequant.kernels.bundle``)."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUNDLED = "optimum_mobilequant/kernels/bundled"


class Tag(BuildHookInterface):  # type: ignore[type-arg]
    """No compiled kernels: a wheel for all platforms, which compiles them on first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if any(Path(self.root, BUNDLED).glob("*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")
            build_data["artifacts"].append(f"{BUNDLED}/*.so")
