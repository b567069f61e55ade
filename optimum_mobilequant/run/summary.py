"""The end of a run in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Losses that a run records, by stage.
_LOSSES = {"learn": "learning", "rounding": "rounding", "finetune": "fine-tuning"}


def summary(recorded: Mapping[str, Any], size: int, parameters: int, place: object) -> str:
    """Perplexity and losses before and after, size, minutes, memory and place of a finished run, for a terminal.

    Args:
        recorded: as in ``model.config.quantization_config.recorded``.
        size: bytes of the saved folder. parameters: of the float model.
        place: where it was saved.
    """
    rows: list[tuple[str, str]] = []
    values = recorded.get("validation_perplexity") or {}
    if {"float", "start", "quantized"} <= values.keys():
        gap = {name: f" ({values[name] / values['float'] - 1:+.2%})" for name in ("start", "quantized")}
        rows += [
            ("perplexity, float", f"{values['float']:.4f}"),
            ("before learning", f"{values['start']:.4f}{gap['start']}"),
            ("quantized", f"{values['quantized']:.4f}{gap['quantized']}"),
        ]
    for name, found in losses(recorded).items():
        rows.append((f"loss of {_LOSSES[name]}", f"{found['start']:.4g} -> {found['best']:.4g}"))
    share = size / (2 * parameters)
    rows.append(("size", f"{size / 1e6:,.1f} MB, {share:.0%} of {2 * parameters / 1e6:,.1f} MB in bfloat16"))
    for name, measured, estimate, unit in (
        ("minutes", "minutes", "minutes_estimate", 1.0),
        ("peak memory, GiB", "peak_memory_bytes", "peak_memory_estimate_bytes", 2**30),
    ):
        if recorded.get(measured) is not None:
            before = recorded.get(estimate)
            note = "" if before is None else f" (estimated before: {before / unit:.2f})"
            rows.append((name, f"{recorded[measured] / unit:.2f}{note}"))
    rows.append(("saved", str(place)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def losses(recorded: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """``start`` and ``best`` of each stage that took a step."""
    found: dict[str, Any] = {name: recorded.get(name) for name in ("rounding", "finetune")}
    if recorded.get("best_step"):
        found = {"learn": recorded.get("loss"), **found}
    return {name: values for name, values in found.items() if isinstance(values, Mapping)}
