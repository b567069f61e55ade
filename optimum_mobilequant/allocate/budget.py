"""What may be spent, what can be chosen, and what each choice costs.

A budget is bytes of the saved tensors (``"auto:1.2GB"``), mean bits of the projections' weights (``"auto:4.5"``), or
what the machine has free less the KV cache and the activations (``"auto:device"``; the resource module of LSAQ, Zeng
et al. 2024).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn import QWeight
from ..plan import Plan, WeightSpec

PREFIX = "auto:"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PROJECTIONS = ("attention", "gate", "up", "down")
# Context that ``"auto:device"`` leaves memory for, unless the model has fewer positions; the exporters' default.
_CONTEXT = 2048
_PROMPT = 128
_ENCODING_BYTES = 8  # float32 scale and int32 zero point of an activation
_ANCHOR_BYTES = 4


@dataclass(frozen=True)
class Budget:
    """``kind`` is ``"bytes"``, ``"bits"`` or ``"device"``; ``value`` a number of bytes or bits, 0 for the device."""

    kind: str
    value: float


def parse_budget(text: str) -> Budget:
    """Read ``"auto:1.2GB"`` (B, KB, MB, GB; KiB, MiB, GiB), ``"auto:4.5"`` or ``"auto:device"``.

    Raises:
        ValueError: anything else.
    """
    rest = text.removeprefix(PREFIX) if isinstance(text, str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", rest)
    if isinstance(text, str) and text.startswith(PREFIX):
        if rest == "device":
            return Budget("device", 0.0)
        if found and not found[2] and float(found[1]) > 0:
            return Budget("bits", float(found[1]))
        if found and found[2].upper() in _UNITS and float(found[1]) > 0:
            return Budget("bytes", float(found[1]) * _UNITS[found[2].upper()])
    raise ValueError(
        f'bits must be "auto:" and a size ("auto:1.2GB"; B, KB, MB, GB, KiB, MiB, GiB), mean bits of the weights '
        f'("auto:4.5") or "auto:device", not {text!r}; fixed bits come from preset and overrides'
    )


@dataclass(frozen=True)
class Unit:
    """Weights that get the same bits.

    Args:
        name: the path of a decoder layer or of a projection.
        paths: of its projections.
        weights: how many numbers they hold.
        bytes: bits -> bytes in a checkpoint, scales included.
    """

    name: str
    paths: tuple[str, ...]
    weights: int
    bytes: dict[int, int]

    def cost(self, bits: int, kind: str) -> int:
        """What ``bits`` cost this unit of a budget of ``kind``."""
        return self.weights * bits if kind == "bits" else self.bytes[bits]


def units_of(model: nn.Module, plan: Plan, choices: Sequence[int], *, by_layer: bool) -> list[Unit]:
    """The decoder layers, or the projections in them, in the order of the network."""
    f, units = plan.family, []
    for i in range(plan.geometry.layers):
        parts = [f.layer(i, part) for part in (f.query, f.key, f.value, f.out, f.gate, f.up, f.down)]
        groups = {f.layer(i): tuple(parts)} if by_layer else {path: (path,) for path in parts}
        for name, paths in groups.items():
            shapes = {path: _matrix(model, path).shape for path in paths}
            costs = {
                bits: sum(stored_bytes(shape, with_bits(plan.weights[path], bits)) for path, shape in shapes.items())
                for bits in choices
            }
            units.append(Unit(name, paths, sum(shape.numel() for shape in shapes.values()), costs))
    return units


def with_bits(spec: WeightSpec, bits: int) -> WeightSpec:
    """The same weight at other bits."""
    return replace(spec, rule=replace(spec.rule, bits=bits))


def stored_bytes(shape: torch.Size, spec: WeightSpec) -> int:
    """Bytes of all tensors that a checkpoint holds for one weight."""
    empty = QWeight.empty(shape, spec.rule, "meta")
    return sum(tensor.numel() * tensor.element_size() for tensor in empty.state_dict().values())


def other_bytes(model: nn.Module, plan: Plan) -> int:
    """Bytes of a checkpoint without its projections: table, head, gains, biases, encodings, prefix, shifts."""
    g, f = plan.geometry, plan.family
    total = _ENCODING_BYTES * len(plan.activations) + _ANCHOR_BYTES
    if plan.prefix:
        for i in range(g.layers):
            for name in (f"{f.layer(i, f.attention)}.key_rotated", f"{f.layer(i, f.value)}.output"):
                total += len(plan.prefix) * g.kv_heads * g.head_dim * plan.activations[name].grid.dtype.itemsize
    if plan.key_shift:
        total += 2 * g.layers * g.kv_heads * g.head_dim
    for path, spec in plan.weights.items():
        module: Any = model.get_submodule(path)
        tied = path == plan.family.head and plan.geometry.tied
        if spec.role not in _PROJECTIONS and not tied:
            total += stored_bytes(module.weight.shape, spec)
        if getattr(module, "bias", None) is not None:
            total += 4 * module.bias.numel()
    return total


def limit_of(budget: Budget, model: PreTrainedModel, plan: Plan, units: Sequence[Unit]) -> tuple[float, int]:
    """What the units may cost together, and what the rest of the model costs (0 for mean bits)."""
    if budget.kind == "bits":
        return budget.value * sum(unit.weights for unit in units), 0
    rest = other_bytes(model, plan)
    available = budget.value if budget.kind == "bytes" else free_memory(model.device) - working_memory(model, plan)
    return available - rest, rest


def free_memory(device: torch.device) -> int:
    """Bytes that a new program could use now, on the CPU or on a CUDA device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def working_memory(model: PreTrainedModel, plan: Plan) -> int:
    """Bytes of a full KV cache and of the activations of a prompt, from the memory plan of the integer graph."""
    from ..exporters.targets.planned import PlannedTensors
    from ..graph import build_graph
    from ..graph.memory import plan_memory

    memory = plan_memory(build_graph(model, plan, PlannedTensors(model, plan)))
    positions = getattr(model.config, "max_position_embeddings", None) or _CONTEXT
    context = min(_CONTEXT, positions)
    prompt = min(_PROMPT, context)
    return memory.cache(batch=1, sequence=prompt, past=context - prompt) + memory.peak(
        batch=1, sequence=prompt, past=context - prompt
    )


def _matrix(model: nn.Module, path: str) -> torch.Tensor:
    module: Any = model.get_submodule(path)
    weight: torch.Tensor = module.weight
    return weight
