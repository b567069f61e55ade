"""Which kernel would serve which layer of a checkpoint on this machine, without loading its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..checkpoint.pack import input_of
from ..config import MobileQuantConfig
from ..kernels import LinearSpec, Output
from ..kernels.registry import unavailable
from ..numerics import Grid
from .backend import FUSED, linears_of
from .linear import KERNEL_BITS, Served, choose_for


def survey(checkpoint: str | Path, *, device: str = "cpu") -> list[Served]:
    """How each linear of a checkpoint would be computed, in the order of the data flow.

    Args:
        checkpoint: folder that this package saved; only its ``config.json`` is read.
        device: type of the device it would be loaded to.

    Raises:
        ValueError: the folder holds no checkpoint of this package.
    """
    from ..hf_quantizer import METHOD, plan_of

    config: Any = AutoConfig.from_pretrained(checkpoint)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        raise ValueError(f"{checkpoint} is no checkpoint that optimum_mobilequant saved")
    options = MobileQuantConfig.from_dict(stored)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = plan_of(model, options)
    found = []
    for path in linears_of(plan):
        linear: Any = model.get_submodule(path)
        spec, input = plan.weights[path], plan.activations[input_of(plan, path)]
        bits = spec.code_grid.bits
        if options.backend == "simulate" or bits not in KERNEL_BITS:
            reasons = {} if options.backend == "simulate" else {"all": "kernels take weights of up to 8 bits"}
            found.append(Served(path, f"linear_w{bits}a{input.bits}", "simulate", reasons))
            continue
        output = Output.on_grid(1.0, 0, Grid(plan.activations[f"{path}.output"].bits, signed=False), torch.float32)
        layer = LinearSpec(
            KERNEL_BITS[bits], input.bits, spec.rule.symmetric, linear.in_features, linear.out_features, device, output
        )
        choice = choose_for(layer, options.backend)
        fused = choice.backend.name in FUSED and path != plan.family.head
        found.append(Served(path, layer.op + (", fused" if fused else ""), choice.backend.name, choice.reasons))
    return found


def survey_table(layers: Iterable[Served]) -> str:
    """Layers grouped by how they are computed, with the reasons, as text."""
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for layer in layers:
        groups.setdefault((layer.backend, layer.operator, tuple(layer.reasons.items())), []).append(layer.name)
    lines = []
    for (backend, operator, reasons), names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{backend:<10}{operator:<22}{len(names):>4} layers  {names[0]}{more}")
        lines += [f"          not {name}: {reason}" for name, reason in reasons]
    if unavailable("cpp") is None:
        from ..kernels import cpp

        kernels = cpp.library()
        others = [name for name in kernels.instruction_sets if name not in (kernels.isa, *kernels.wrong)]
        also = f" (also here: {', '.join(others)})" if others else ""
        lines.append(f"instruction set of cpp: {kernels.isa}{also}")
        wrong = "it computes wrong results here; please report this"
        lines += [f"          not {name}: {wrong}" for name in kernels.wrong]
    return "\n".join(lines)
