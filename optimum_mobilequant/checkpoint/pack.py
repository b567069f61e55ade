"""Fold the learned parameters, round to integers, and put the integers into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# As a module: nn may be half imported when loading transformers brings us here, see registration.py.
from .. import nn as quantized_nn
from ..log import get_logger, progress_bar
from ..nn import QWeight, quantizers_of
from ..nn.formats import FormatWeight, TunableFormat
from ..nn.prefix import PackedPrefix, TunablePrefix
from ..nn.shift import PackedShift, TunableShift
from ..nn.tunable import TunableBias, TunableWeight
from ..numerics import dequantize, quantize
from ..numerics.qparams import Grid
from ..plan import Plan

logger = get_logger(__name__)

_BIAS_GRID = Grid(32, signed=True)
# Share of a layer's prefix beyond the ranges from which a warning is due.
_CLIPPED = 0.01


@dataclass
class Packed:
    """All integers of a quantized model.

    Args:
        weights: module path -> (signed codes, scale, zero point). biases: module path -> float32 on its int32 grid.
        activations: quantizer name -> (scale, zero point), 0-dim.
        multipliers: module path -> multiplier of each group, for weights that have groups.
        prefix: attention path -> codes of the prefix' keys and values; empty without a prefix.
        shifts: attention path -> codes of what is added to its rotated keys; empty without.
        formatted: module path -> the tensors of a storage format, whose bias is any float32.
    """

    weights: dict[str, tuple[Tensor, Tensor, Tensor]]
    biases: dict[str, Tensor]
    activations: dict[str, tuple[Tensor, Tensor]]
    multipliers: dict[str, Tensor] = field(default_factory=dict)
    prefix: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    formatted: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat, for a stage file."""
        flat = {f"bias/{path}": bias for path, bias in self.biases.items()}
        flat |= {f"shift/{path}": codes for path, codes in self.shifts.items()}
        flat |= {f"multiplier/{path}": multiplier for path, multiplier in self.multipliers.items()}
        for path, parts in self.weights.items():
            flat |= {f"weight/{path}/{n}": t for n, t in zip(("codes", "scale", "zero_point"), parts, strict=True)}
        for name, (scale, zero_point) in self.activations.items():
            flat |= {f"activation/{name}/scale": scale, f"activation/{name}/zero_point": zero_point}
        for path, (keys, values) in self.prefix.items():
            flat |= {f"prefix/{path}/key": keys, f"prefix/{path}/value": values}
        for path, held in self.formatted.items():
            flat |= {f"formatted/{path}/{name}": tensor for name, tensor in held.items()}
        return {key: tensor.contiguous() for key, tensor in flat.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Packed:
        def names(kind: str) -> list[str]:
            return sorted({key.split("/")[1] for key in tensors if key.startswith(f"{kind}/")})

        return cls(
            {p: (*(tensors[f"weight/{p}/{n}"] for n in ("codes", "scale", "zero_point")),) for p in names("weight")},  # type: ignore[misc]
            {p: tensors[f"bias/{p}"] for p in names("bias")},
            {
                n: (tensors[f"activation/{n}/scale"], tensors[f"activation/{n}/zero_point"])
                for n in names("activation")
            },
            {p: tensors[f"multiplier/{p}"] for p in names("multiplier")},
            {p: (tensors[f"prefix/{p}/key"], tensors[f"prefix/{p}/value"]) for p in names("prefix")},
            {p: tensors[f"shift/{p}"] for p in names("shift")},
            {
                path: {k.split("/")[2]: t for k, t in tensors.items() if k.startswith(f"formatted/{path}/")}
                for path in names("formatted")
            },
        )


@torch.no_grad()
def pack(student: nn.Module, plan: Plan) -> Packed:
    """Fold transforms and clipping of a tuned student into its weights and round them to nearest.

    Biases land on int32 grids, see :func:`bias_scale`.

    Raises:
        ValueError: a scale is not finite and positive (names the tensor).
    """
    packed = Packed({}, {}, {q.spec.name: (q.scale.clone(), q.zero_point.clone()) for q in quantizers_of(student)})
    modules = dict(student.named_modules())
    bar = progress_bar(plan.weights, "pack", unit="tensor")
    for path in bar:
        module = modules[path]
        if isinstance(module.weight, TunableFormat):
            packed.formatted[path] = module.weight.tensors()
        elif isinstance(module.weight, TunableWeight):
            packed.weights[path] = module.weight.codes()
            if (multiplier := module.weight.multiplier()) is not None:
                packed.multipliers[path] = multiplier
        if isinstance(module.bias if hasattr(module, "bias") else None, TunableBias):
            bias = module.bias.folded()
            if path in packed.formatted:
                packed.biases[path] = bias
                continue
            scale = bias_scale(plan, path, packed.activations, packed.weights[path][1])
            zero = torch.zeros((), dtype=torch.int32, device=bias.device)
            packed.biases[path] = dequantize(quantize(bias, scale, zero, _BIAS_GRID), scale, zero)
    for path, module in modules.items():
        if isinstance(module, TunableShift):
            attention = path.rpartition(".")[0]
            packed.shifts[attention] = module.pack(modules[attention])
        if isinstance(module, TunablePrefix):
            attention = path.rpartition(".")[0]
            keys, values, clipped = module.codes(modules[attention])
            packed.prefix[attention] = (keys, values)
            if clipped > _CLIPPED:
                logger.warning(f"{clipped:.1%} of the prefix in {attention} lie beyond the ranges of keys and values")
    scales = {f"{path}.weight": parts[1] for path, parts in packed.weights.items()}
    scales |= {name: parts[0] for name, parts in packed.activations.items()}
    if bad := [name for name, scale in scales.items() if not (torch.isfinite(scale).all() and (scale > 0).all())]:
        raise ValueError(f"these scales are not finite and positive: {', '.join(bad)}")
    return packed


def bias_scale(
    plan: Plan, path: str, activations: Mapping[str, tuple[Tensor, Tensor]], weight_scale: Tensor
) -> Tensor:
    """Scale of the int32 grid of a bias, ``[out]`` or 0-dim.

    A linear's is that of its accumulator, ``input scale * weight scale``. A LayerNorm's is 2^-15 steps of its output:
    32 bits then reach 65536 output steps.
    """
    if plan.weights[path].role == "gain":
        return activations[f"{path}.output"][0] * 2.0**-15
    return activations[input_of(plan, path)][0] * weight_scale.reshape(-1)


def input_of(plan: Plan, linear: str) -> str:
    """Name of the activation a linear reads, through data movement."""
    name = f"{linear}.input"
    while name in plan.moves:
        name = plan.moves[name]
    return name


def install(model: nn.Module, plan: Plan, packed: Packed) -> None:
    """Turn a float model, in place, into the quantized one; each float weight is freed as it is replaced."""
    device = model.get_parameter(f"{plan.family.final_norm}.weight").device

    def make_weight(path: str, weight: Tensor) -> QWeight | FormatWeight:
        if path in packed.formatted:
            tensors = {name: tensor.to(device) for name, tensor in packed.formatted[path].items()}
            return FormatWeight(tensors, weight.shape, plan.weights[path].rule)
        codes, scale, zero_point = (t.to(device) for t in packed.weights[path])
        multiplier = packed.multipliers.get(path)
        rule = plan.weights[path].rule
        return QWeight(codes, scale, zero_point, rule, None if multiplier is None else multiplier.to(device))

    def make_bias(path: str, _: Tensor) -> nn.Parameter:
        return nn.Parameter(packed.biases[path].to(device), requires_grad=False)

    config: Any = model.config
    for path, bias in packed.biases.items():  # bias correction may have added some
        linear: Any = model.get_submodule(path)
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(bias, device=device), requires_grad=False)
    f = plan.family
    for flag, parts in f.bias_flags.items():
        if any(f.layer(0, getattr(f, part)) in packed.biases for part in parts):
            setattr(config, flag, True)

    def make_prefix(path: str) -> PackedPrefix:
        keys, values = (codes.to(device) for codes in packed.prefix[path])
        return PackedPrefix(keys, values, value_path(plan))

    def make_shift(path: str) -> PackedShift:
        return PackedShift(packed.shifts[path].to(device), key_path(plan))

    quantized_nn.swap(model, plan, make_weight, make_bias, make_prefix, make_shift)
    config.tie_word_embeddings = plan.geometry.tied  # the head may have got a table of its own
    for quantizer in quantizers_of(model):
        quantizer.set(*packed.activations[quantizer.spec.name])


def value_path(plan: Plan) -> str:
    """Path of the value projection from the attention."""
    return plan.family.value.removeprefix(f"{plan.family.attention}.")


def key_path(plan: Plan) -> str:
    """Path from the attention of what makes the keys that are rotated: their norm, or the key projection."""
    return (plan.family.key_norm or plan.family.key).removeprefix(f"{plan.family.attention}.")


def skeleton(model: nn.Module, plan: Plan) -> None:
    """Replace the modules by empty quantized ones, on the model's device, for a checkpoint loader to fill."""

    def make_weight(path: str, weight: Tensor) -> QWeight | FormatWeight:
        rule = plan.weights[path].rule
        return (QWeight if rule.format == "int" else FormatWeight).empty(weight.shape, rule, weight.device)

    def make_bias(_: str, bias: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(bias, dtype=torch.float32), requires_grad=False)

    def make_prefix(path: str) -> PackedPrefix:
        f, g = plan.family, plan.geometry
        index = int(path.removesuffix(f".{f.attention}").rpartition(".")[2])
        owners = (f"{path}.key_rotated", f"{f.layer(index, f.value)}.output")
        shape, device = (
            (g.kv_heads, len(plan.prefix), g.head_dim),
            model.get_parameter(f"{f.final_norm}.weight").device,
        )
        keys, values = (torch.empty(shape, dtype=plan.activations[n].grid.dtype, device=device) for n in owners)
        return PackedPrefix(keys, values, value_path(plan))

    def make_shift(path: str) -> PackedShift:
        g, device = plan.geometry, model.get_parameter(f"{plan.family.final_norm}.weight").device
        return PackedShift(torch.empty(g.kv_heads, g.head_dim, dtype=torch.int16, device=device), key_path(plan))

    quantized_nn.swap(model, plan, make_weight, make_bias, make_prefix, make_shift)
