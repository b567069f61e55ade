"""The three layouts of an encodings file: writing and reading them.

Layouts and signs: AIMET's encodings documentation, versions 0.6.1, 1.0.0 and 2.0.0. In the first two
``x = (code + offset) * scale`` with codes that start at 0, signed tensors included, so
``offset = -(zero_point - qmin)``: -128 for symmetric int8, -130 for uint8 with zero point 130. ``is_symmetric`` says
there that the codes are signed. 2.0.0 has ONNX's signs: ``y_zero_point`` on the grid that ``output_dtype`` names.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...numerics import Grid
from ..options import ENCODINGS_VERSIONS
from .tensor import TensorEncoding, validate

Json = dict[str, Any]


def encodings_dict(encodings: Sequence[TensorEncoding], version: str = "1.0.0") -> Json:
    """The contents of an encodings file.

    Args:
        version: one of :data:`~..options.ENCODINGS_VERSIONS`. 2.0.0 has no word for float tensors and leaves them out.

    Raises:
        ValueError: damaged encodings, an unknown version, or blocks in 0.6.1.
    """
    validate(encodings)
    return _layout(version)[0](encodings)


def write_encodings(encodings: Sequence[TensorEncoding], path: Path, version: str = "1.0.0") -> None:
    """Write :func:`encodings_dict` to a file, one line for each tensor."""
    data = encodings_dict(encodings, version)
    path.write_text(_lines(data) + "\n", encoding="utf-8")


def _lines(data: Any, level: int = 0) -> str:
    """JSON with one line for each tensor: files may hold a scale for each of 100 000 channels."""
    if level == 2 or not isinstance(data, (dict, list)) or not data:
        return json.dumps(data, allow_nan=False, ensure_ascii=False)
    inner, pad = " " * (level + 1), " " * level
    if isinstance(data, dict):
        items = [f"{inner}{json.dumps(k, ensure_ascii=False)}: {_lines(v, level + 1)}" for k, v in data.items()]
        return "{\n" + ",\n".join(items) + f"\n{pad}}}"
    return "[\n" + ",\n".join(inner + _lines(v, level + 1) for v in data) + f"\n{pad}]"


def _offsets(encoding: TensorEncoding, grid: Grid) -> list[int]:
    return [grid.qmin - zero_point for zero_point in encoding.zero_point]


def _sections(encodings: Sequence[TensorEncoding]) -> tuple[list[TensorEncoding], list[TensorEncoding]]:
    return [e for e in encodings if not e.is_param], [e for e in encodings if e.is_param]


def _quantizer_args(encodings: Sequence[TensorEncoding]) -> Json:
    """What AIMET's own files say about their defaults: the most frequent bits. Converters use it for nothing else."""
    activations, params = _sections([e for e in encodings if e.grid is not None])
    matrices = [e for e in params if e.kind != "tensor"] or params

    def usual(found: Sequence[TensorEncoding]) -> int:
        bits = Counter(e.grid.bits for e in found if e.grid is not None and e.grid.bits < 32)
        return bits.most_common(1)[0][0] if bits else 16

    return {
        "activation_bitwidth": usual(activations),
        "param_bitwidth": usual(matrices),
        "dtype": "int",
        "is_symmetric": all(e.grid.signed for e in matrices if e.grid is not None),
        "per_channel_quantization": any(e.kind == "channel" for e in params),
        "quant_scheme": "min_max",
    }


def _write_0_6_1(encodings: Sequence[TensorEncoding]) -> Json:
    if blocks := [e.name for e in encodings if e.kind == "block"]:
        raise ValueError(f"encodings 0.6.1 have no form for blocks of weights ({blocks[0]}): use version 1.0.0")

    def entry(encoding: TensorEncoding) -> list[Json]:
        grid = encoding.grid
        if grid is None:
            return [{"bitwidth": 16, "dtype": "float"}]
        fixed = {"bitwidth": grid.bits, "dtype": "int", "is_symmetric": str(grid.signed)}
        return [
            {
                **fixed,
                "min": offset * scale,
                "max": (offset + 2**grid.bits - 1) * scale,
                "scale": scale,
                "offset": offset,
            }
            for scale, offset in zip(encoding.scale, _offsets(encoding, grid), strict=True)
        ]

    activations, params = ({e.name: entry(e) for e in section} for section in _sections(encodings))
    sections = {"activation_encodings": activations, "param_encodings": params}
    return {"version": "0.6.1", **sections, "quantizer_args": _quantizer_args(encodings)}


def _write_1_0_0(encodings: Sequence[TensorEncoding]) -> Json:
    def entry(encoding: TensorEncoding) -> Json:
        grid = encoding.grid
        if grid is None:
            return {"name": encoding.name, "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}
        more = {"block_size": encoding.block_size} if encoding.block_size else {}
        return {
            "name": encoding.name,
            "enc_type": f"PER_{encoding.kind.upper()}",
            "dtype": "INT",
            "bw": grid.bits,
            "is_sym": grid.signed,
            "scale": list(encoding.scale),
            "offset": _offsets(encoding, grid),
            **more,
        }

    activations, params = ([entry(e) for e in section] for section in _sections(encodings))
    sections = {"activation_encodings": activations, "param_encodings": params}
    return {"version": "1.0.0", **sections, "quantizer_args": _quantizer_args(encodings)}


def _write_2_0_0(encodings: Sequence[TensorEncoding]) -> Json:
    def shaped(encoding: TensorEncoding, values: Sequence[Any]) -> Any:
        if encoding.kind == "tensor":
            return values[0]
        if encoding.kind == "channel":
            return list(values)
        # In the tensor's own shape, with a block for each run along the axis.
        rows = [list(values[i : i + encoding.blocks]) for i in range(0, len(values), encoding.blocks)]
        return [list(row) for row in zip(*rows, strict=True)] if encoding.axis == 0 else rows

    def entry(encoding: TensorEncoding, grid: Grid) -> Json:
        dtype = f"{'' if grid.signed else 'u'}int{grid.bits}"
        data: Json = {"name": encoding.name, "output_dtype": dtype, "y_scale": shaped(encoding, encoding.scale)}
        if any(encoding.zero_point):
            data["y_zero_point"] = shaped(encoding, encoding.zero_point)
        if encoding.kind != "tensor":
            if encoding.axis is None:
                raise ValueError(f"encodings 2.0.0 state the axis of {encoding.name}, which is not known")
            data["axis"] = encoding.axis
        return data | ({"block_size": encoding.block_size} if encoding.block_size else {})

    return {"version": "2.0.0", "encodings": [entry(e, e.grid) for e in encodings if e.grid is not None]}


# Reading.


def parse_encodings(data: Mapping[str, Any]) -> list[TensorEncoding]:
    """The tensors of an encodings file of any version.

    Args:
        data: parsed JSON. Files before 2.0.0 give no ``axis`` and no ``blocks``; 2.0.0 gives ``is_param`` False
            throughout, for it has one list.

    Raises:
        ValueError: an unknown version, a missing or malformed key, or what :func:`validate` refuses.
    """
    read = _layout(data.get("version"))[1]
    try:
        found = read(data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the encodings do not have the layout of version {data['version']} ({type(error).__name__}: {error})"
        ) from error
    validate(found)
    return found


def _integers(values: Iterable[Any], name: str) -> tuple[int, ...]:
    found = tuple(values)
    if bad := [v for v in found if isinstance(v, bool) or not math.isfinite(v) or v != int(v)]:
        raise ValueError(f"the offset {bad[0]} of {name} is not a whole number")
    return tuple(map(int, found))


def _from_offsets(name: str, scale: Any, offset: Any, bits: int, signed: bool, **more: Any) -> TensorEncoding:
    grid = Grid(bits, signed)
    zero_point = tuple(grid.qmin - value for value in _integers(offset, name))
    return TensorEncoding(name, tuple(map(float, scale)), zero_point, grid, **more)


def _read_0_6_1(data: Mapping[str, Any]) -> list[TensorEncoding]:
    def entry(name: str, rows: Sequence[Json], is_param: bool) -> TensorEncoding:
        first = rows[0]
        if first["dtype"] == "float":
            return TensorEncoding(name, (), (), None, is_param=is_param)
        signed = {"True": True, "False": False}[first["is_symmetric"]]
        scale, offset = [row["scale"] for row in rows], [row["offset"] for row in rows]
        return _from_offsets(name, scale, offset, first["bitwidth"], signed, is_param=is_param)

    sections = (("activation_encodings", False), ("param_encodings", True))
    return [entry(name, rows, is_param) for key, is_param in sections for name, rows in data[key].items()]


def _read_1_0_0(data: Mapping[str, Any]) -> list[TensorEncoding]:
    def entry(row: Json, is_param: bool) -> TensorEncoding:
        if row["dtype"] == "FLOAT":
            return TensorEncoding(row["name"], (), (), None, is_param=is_param)
        if row["enc_type"] not in ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK"):
            raise ValueError(f"{row['name']} has an encoding of type {row['enc_type']}, which is not read here")
        more = {"block_size": row["block_size"]} if row["enc_type"] == "PER_BLOCK" else {}
        args = (row["name"], row["scale"], row["offset"], row["bw"], row["is_sym"])
        return _from_offsets(*args, is_param=is_param, **more)

    sections = (("activation_encodings", False), ("param_encodings", True))
    return [entry(row, is_param) for key, is_param in sections for row in data[key]]


def _read_2_0_0(data: Mapping[str, Any]) -> list[TensorEncoding]:
    def flat(row: Json, values: Any) -> tuple[list[Any], int]:
        if "block_size" not in row:
            return (list(values) if isinstance(values, list) else [values]), 0
        rows = list(zip(*values, strict=True)) if row["axis"] == 0 else values
        return [value for inner in rows for value in inner], len(rows[0])

    def entry(row: Json) -> TensorEncoding:
        name, dtype = row["name"], row["output_dtype"]
        signed, digits = not dtype.startswith("u"), dtype.removeprefix("u").removeprefix("int")
        if not digits.isdecimal():
            raise ValueError(f"{name} has the type {dtype}, which is not read here")
        scale, blocks = flat(row, row["y_scale"])
        zeros = flat(row, row["y_zero_point"])[0] if "y_zero_point" in row else [0] * len(scale)
        grid, axis, size = Grid(int(digits), signed), row.get("axis"), row.get("block_size", 0)
        return TensorEncoding(name, tuple(map(float, scale)), _integers(zeros, name), grid, axis, size, blocks)

    return [entry(row) for row in data["encodings"]]


_Writer = Callable[[Sequence[TensorEncoding]], Json]
_Reader = Callable[[Mapping[str, Any]], list[TensorEncoding]]
_LAYOUTS: dict[str, tuple[_Writer, _Reader]] = {
    "1.0.0": (_write_1_0_0, _read_1_0_0),
    "0.6.1": (_write_0_6_1, _read_0_6_1),
    "2.0.0": (_write_2_0_0, _read_2_0_0),
}
assert tuple(_LAYOUTS) == ENCODINGS_VERSIONS


def _layout(version: Any) -> tuple[_Writer, _Reader]:
    if version not in _LAYOUTS:
        raise ValueError(f"encodings version {version!r} is unknown; known: {', '.join(_LAYOUTS)}")
    return _LAYOUTS[version]
