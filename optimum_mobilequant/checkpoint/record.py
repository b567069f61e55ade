"""Adding a measurement to a saved checkpoint's own record, in ``config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model that this package quantized."""
    return _quantization(folder) is not None


def recorded_base(folder: Path) -> str | None:
    """Hub id of the float model that a checkpoint was made from; None if it records none, or is no checkpoint."""
    name = ((_quantization(folder) or {}).get("recorded") or {}).get("base_model")
    return name if isinstance(name, str) and name else None


def _quantization(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == "mobilequant" else None


def record_evaluation(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """Store ``values`` as ``quantization_config.recorded["evaluations"][name]``; nothing else in the file changes.

    The file is replaced in one step: a killed process leaves the old one. An earlier record of that name is replaced.

    Raises:
        ValueError: the folder holds no checkpoint of this package.
        OSError: the file cannot be written.
    """
    if not is_checkpoint(folder):
        raise ValueError(f"{folder} holds no checkpoint of mobilequant: nothing to record in")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    recorded = config["quantization_config"].setdefault("recorded", {})
    recorded.setdefault("evaluations", {})[name] = json.loads(json.dumps(values, allow_nan=False))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
