"""List every tensor of a saved checkpoint with its encoding, without loading the model.

Only ``config.json``, the headers of the safetensors files and the small tensors of encodings are read; the model is
built on the meta device, to know what the files must hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..config import MobileQuantConfig
from ..hf_quantizer import METHOD, plan_of, sentinel_key
from ..nn.shift import SHIFT_GRID
from ..numerics import Grid
from ..numerics.integer_elementwise import shift_step
from ..plan import ActivationSpec, Plan, WeightSpec
from . import check_files, skeleton
from .pack import bias_scale, input_of, key_path
from .reader import TensorReader

_COLUMNS = ("tensor", "role", "bits", "scale", "zero_point", "min", "max", "bytes")


@dataclass
class Inspection:
    """What a checkpoint holds.

    Attributes:
        rows: one dict for each tensor of the integer graph, activations first, in the order of the data flow. Keys:
            ``tensor``, ``kind`` (activation, weight, bias, prefix or shift), ``role``, ``bits``; ``scale`` and
            ``zero_point`` (one number, or [smallest, largest] over the channels; None for a LayerNorm's bias, which
            has no grid of its own); ``min`` and ``max``, the ends of what the integers can represent (of a bias: of
            what they hold); ``bytes`` in the file.
        moves: tensors that only move data -> the tensor whose encoding they carry.
        totals: counts by kind; ``parameters`` and ``bits_per_parameter`` (weights and biases with their scales);
            ``bytes`` (all tensors) and ``file_bytes`` (the safetensors files with their headers).
        config: preset, recipe, family and format version.
    """

    rows: list[dict[str, Any]]
    moves: dict[str, str]
    totals: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """For a terminal: the rows, then the data movement, then the totals."""
        lines = [list(_COLUMNS)] + [[_cell(row[column]) for column in _COLUMNS] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
            text.append("  ".join(names + [cell.rjust(w) for cell, w in zip(line[2:], widths[2:], strict=True)]))
        width = max((len(name) for name in self.moves), default=0)
        text += ["", "data movement"] + [f"{name:<{width}}  as  {source}" for name, source in self.moves.items()]
        summary = (self.config | self.totals).items()
        return "\n".join([*text, ""] + [f"{key.replace('_', ' '):<20}{_cell(value)}" for key, value in summary])


def inspect_checkpoint(path: str | PathLike[str]) -> Inspection:
    """Read the encodings of a checkpoint that :func:`~optimum_mobilequant.quantize` produced.

    Args:
        path: the saved folder.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: another kind of checkpoint; damaged files; a tensor of the integer graph without a valid encoding,
            or a stored tensor that the graph does not have (names it).
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {str(path)!r}: give a folder that mobilequant saved")
    reader = _Reader(folder)
    model, config = empty_model(folder)
    plan = plan_of(model, config)
    skeleton(model, plan)
    check_files(model, map(str, reader.files), config.to_dict(), sentinel_key(plan))
    rows = [_activation_row(spec, reader) for spec in plan.activations.values()]
    moves = dict(plan.moves)
    for spec in plan.weights.values():
        if spec.name == plan.family.head and plan.geometry.tied:
            moves[f"{spec.name}.weight"] = f"{plan.family.embedding}.weight"
        else:
            rows.append(_weight_row(spec, reader))
    rows += [_bias_row(name, model, plan, reader) for name in plan.weights if f"{name}.bias" in reader.keys]
    rows += _prefix_rows(plan, reader) + _shift_rows(plan, reader)
    reader.taken |= {f"{plan.family.embedding}.dtype_anchor", sentinel_key(plan)}  # they hold nothing
    if left := sorted(reader.keys - reader.taken):
        raise ValueError(f"{len(left)} stored tensors have no place in the plan, e.g. {', '.join(left[:4])}")
    totals = _totals(rows, model, reader)
    described = {"preset": config.preset, "recipe": config.recipe, "effort": config.effort, "family": plan.family.name}
    return Inspection(rows, moves, totals, described | {"format_version": config.format_version})


def empty_model(folder: Path) -> tuple[PreTrainedModel, MobileQuantConfig]:
    """The architecture without weights, and the quantization config."""
    architecture = AutoConfig.from_pretrained(folder)
    stored = getattr(architecture, "quantization_config", None)
    stored = stored if isinstance(stored, Mapping) or stored is None else stored.to_dict()
    if stored is None or stored.get("quant_method") != METHOD:
        found = "a float model" if stored is None else f"quantized by {stored.get('quant_method')!r}"
        raise ValueError(
            f"{str(folder)!r} is {found}, not a mobilequant checkpoint: give a folder that quantize saved"
        )
    config = MobileQuantConfig.from_dict(stored)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture), config


class _Reader(TensorReader):
    """Remembers which keys were asked for."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.taken: set[str] = set()

    def tensor(self, key: str) -> Tensor:
        self.taken.add(key)
        return self.read(key)

    def under(self, prefix: str) -> list[str]:
        return [key for key in self.keys if key.startswith(f"{prefix}.")]

    @property
    def total_bytes(self) -> int:
        return sum(map(self.bytes_of, self.keys))

    def bytes_of(self, key: str) -> int:
        return math.prod(self.shape(key)) * _bits_of(self.stored_dtype(key)) // 8


def _bits_of(dtype: str) -> int:
    return int("".join(c for c in dtype if c.isdigit()))  # "F32", "BF16", "U8", ...


def _activation_row(spec: ActivationSpec, reader: _Reader) -> dict[str, Any]:
    scale, zero_point = reader.tensor(f"{spec.name}.scale"), reader.tensor(f"{spec.name}.zero_point")
    stored = sum(map(reader.bytes_of, reader.under(spec.name)))
    row = _row((spec.name, "activation", spec.role), scale, zero_point, spec.grid, stored)
    if spec.fixed is not None and (row["scale"], row["zero_point"]) != _as_stored(spec.fixed):
        raise ValueError(f"activation {spec.name} has the fixed encoding {spec.fixed}, but the file holds another one")
    return row


def _as_stored(fixed: tuple[float, int]) -> tuple[float, int]:
    return torch.tensor(fixed[0], dtype=torch.float32).item(), fixed[1]


def _weight_row(spec: WeightSpec, reader: _Reader) -> dict[str, Any]:
    name = f"{spec.name}.weight"
    keys = reader.under(name)
    reader.taken.update(keys)
    if spec.rule.format != "int":
        return _format_row(name, spec, keys, reader)
    scale = reader.tensor(f"{name}._scale")
    if f"{name}._multiplier" in keys:
        scale = scale * reader.tensor(f"{name}._multiplier")
    if f"{name}._shift" in keys:
        zero_point = reader.tensor(f"{name}._shift").to(torch.int32) - 8
    elif f"{name}._zero_point" in keys:
        zero_point = reader.tensor(f"{name}._zero_point")
    else:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return _row((name, "weight", spec.role), scale, zero_point, spec.grid, sum(map(reader.bytes_of, keys)))


def _format_row(name: str, spec: WeightSpec, keys: list[str], reader: _Reader) -> dict[str, Any]:
    """A matrix in a storage format: no encoding on a grid of integers."""
    if damaged := [k for k in keys if reader.stored_dtype(k) == "F32" and not torch.isfinite(reader.tensor(k)).all()]:
        raise ValueError(f"{damaged[0]} in the checkpoint is not finite; the file is damaged")
    row = {"tensor": name, "kind": "weight", "role": f"{spec.role} ({spec.rule.format})", "bits": spec.rule.bits}
    empty = dict.fromkeys(("scale", "zero_point", "min", "max"))
    return row | empty | {"bytes": sum(map(reader.bytes_of, keys))}


def _bias_row(owner: str, model: PreTrainedModel, plan: Plan, reader: _Reader) -> dict[str, Any]:
    """Biases lie on int32 grids, see ``checkpoint.pack.bias_scale``."""
    name = f"{owner}.bias"
    bias = reader.tensor(name)
    if not torch.isfinite(bias).all():
        raise ValueError(f"bias {name} in the checkpoint is not finite; the file is damaged")
    tied = owner == plan.family.head and plan.geometry.tied
    if plan.weights[owner].rule.format != "int":
        row = {"tensor": name, "kind": "bias", "role": "bias", "bits": 32, "scale": None, "zero_point": None}
        return row | {"min": bias.min().item(), "max": bias.max().item(), "bytes": reader.bytes_of(name)}
    of_weight = reader.tensor(f"{plan.family.embedding if tied else owner}.weight._scale")
    near = {n: (reader.tensor(f"{n}.scale"), torch.empty(0)) for n in {f"{owner}.output", input_of(plan, owner)}}
    scale = bias_scale(plan, owner, near, of_weight)
    row = {"tensor": name, "kind": "bias", "role": "bias", "bits": 32, "scale": _ends(scale), "zero_point": 0}
    return row | {"min": bias.min().item(), "max": bias.max().item(), "bytes": reader.bytes_of(name)}


def _prefix_rows(plan: Plan, reader: _Reader) -> list[dict[str, Any]]:
    """Keys and values of the prefix tokens, on the encodings of the cache."""
    f, rows = plan.family, []
    for i in range(plan.geometry.layers if plan.prefix else 0):
        attention = f.layer(i, f.attention)
        for part, owner in (("key", f"{attention}.key_rotated"), ("value", f"{f.layer(i, f.value)}.output")):
            name, spec = f"{attention}.prefix.{part}", plan.activations[owner]
            reader.taken.add(name)
            encoding = reader.tensor(f"{owner}.scale"), reader.tensor(f"{owner}.zero_point")
            rows.append(_row((name, "prefix", spec.role), *encoding, spec.grid, reader.bytes_of(name)))
    return rows


def _shift_rows(plan: Plan, reader: _Reader) -> list[dict[str, Any]]:
    """Constants added to rotated keys, on a grid of the steps of what is rotated."""
    f, rows = plan.family, []
    for i in range(plan.geometry.layers if plan.key_shift else 0):
        attention = f.layer(i, f.attention)
        name, spec = f"{attention}.key_shift.codes", plan.activations[f"{attention}.{key_path(plan)}.output"]
        reader.taken.add(name)
        scale = reader.tensor(f"{spec.name}.scale") * shift_step(spec.bits)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        names = (name.removesuffix(".codes"), "shift", "key_rotated")
        rows.append(_row(names, scale, zero_point, SHIFT_GRID, reader.bytes_of(name)))
    return rows


def _row(names: tuple[str, str, str], scale: Tensor, zero_point: Tensor, grid: Grid, stored: int) -> dict[str, Any]:
    """The row of a tensor called (name, kind, role); raises ValueError if it has no valid encoding."""
    name, kind, role = names
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{kind} {name} has no encoding: its scale is not finite and positive")
    if not ((zero_point >= grid.qmin) & (zero_point <= grid.qmax)).all():
        raise ValueError(f"{kind} {name} has a zero point outside its {grid.bits}-bit grid; the file is damaged")
    row = {"tensor": name, "kind": kind, "role": role, "bits": grid.bits}
    row |= {"scale": _ends(scale), "zero_point": _ends(zero_point)}
    row |= {
        "min": ((grid.qmin - zero_point) * scale).min().item(),
        "max": ((grid.qmax - zero_point) * scale).max().item(),
    }
    return row | {"bytes": stored}


def _ends(values: Tensor) -> Any:
    """The one value, or [smallest, largest]."""
    low, high = values.min().item(), values.max().item()
    return low if low == high else [low, high]


def _totals(rows: list[dict[str, Any]], model: PreTrainedModel, reader: _Reader) -> dict[str, Any]:
    kinds = [row["kind"] for row in rows]
    constants = [row for row in rows if row["kind"] in ("weight", "bias")]
    parameters = 0
    for row in constants:
        owner, _, part = row["tensor"].rpartition(".")
        parameters += math.prod(getattr(model.get_submodule(owner), part).shape)
    return {
        "activations": kinds.count("activation"),
        "weights": kinds.count("weight"),
        "biases": kinds.count("bias"),
        **{
            f"{kind}_bytes": sum(row["bytes"] for row in rows if row["kind"] == kind)
            for kind in ("prefix", "shift")
            if kind in kinds
        },
        "parameters": parameters,
        "bits_per_parameter": 8 * sum(row["bytes"] for row in constants) / parameters,
        "bytes": reader.total_bytes,
        "file_bytes": sum(file.stat().st_size for file in reader.files),
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " .. ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
