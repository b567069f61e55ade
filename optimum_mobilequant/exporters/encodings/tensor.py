"""What an encodings file says about a tensor, before it takes one of the layouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...numerics import Grid

if TYPE_CHECKING:
    from ..onnx.types import Record


@dataclass(frozen=True)
class TensorEncoding:
    """What an encodings file says about one tensor.

    Args:
        name: of the tensor in the ONNX graph.
        scale: one number, or one for each channel, or for each block of each channel (the blocks of a channel lie
            together). Empty for a float tensor.
        zero_point: as many integers, on ``grid``.
        grid: the integers; None for a tensor that stays in 16-bit float.
        axis: of the channels, or of the blocks if ``block_size`` is set; None for one scale. Files before 2.0.0 do not
            state it.
        block_size: values that share a scale along ``axis``; 0 without blocks.
        blocks: scales of each channel, where there are blocks.
        is_param: a constant of the graph, not an activation.
    """

    name: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    grid: Grid | None
    axis: int | None = None
    block_size: int = 0
    blocks: int = 0
    is_param: bool = False

    @property
    def kind(self) -> str:
        """``"float"``, ``"tensor"``, ``"channel"`` or ``"block"``."""
        if self.grid is None:
            return "float"
        return "block" if self.block_size else "tensor" if self.axis is None and len(self.scale) == 1 else "channel"

    def same_codes(self, other: TensorEncoding) -> bool:
        """Whether equal codes mean equal values in both."""
        return (self.scale, self.zero_point, self.grid, self.block_size) == (
            other.scale,
            other.zero_point,
            other.grid,
            other.block_size,
        )


def tensor_encodings(records: Mapping[str, Record]) -> list[TensorEncoding]:
    """Encodings of all float tensors of an emitted graph, checked.

    Args:
        records: what :func:`~..onnx.emit` says about them. Asymmetric signed codes (weights) are restated as unsigned
            ones, for files before 2.0.0 know no others and HTP reads 4-bit ones wrongly; the values stay the same.

    Raises:
        ValueError: see :func:`validate`.
    """
    found = [_of_record(record) for record in records.values()]
    validate(found)
    return found


def _of_record(record: Record) -> TensorEncoding:
    is_param, encoding = record.origin == "constant", record.encoding
    if encoding is None:
        return TensorEncoding(record.name, (), (), None, is_param=is_param)
    grid, zero_point = encoding.grid, encoding.zero_point
    if grid.signed and bool(zero_point.any()):
        grid, zero_point = Grid(grid.bits, signed=False), zero_point - grid.qmin
    blocks = encoding.scale.shape[-1] if encoding.per_block else 0
    scale, zeros = encoding.scale.flatten().tolist(), zero_point.flatten().tolist()
    return TensorEncoding(
        record.name, tuple(scale), tuple(zeros), grid, record.axis, encoding.block_size, blocks, is_param
    )


def validate(encodings: Iterable[TensorEncoding]) -> None:
    """Refuse encodings that no runtime could use.

    Raises:
        ValueError: names every tensor with a scale that is not finite and positive, a zero point outside its grid, or
            two entries.
    """
    found = list(encodings)
    faults = [f"{name} has {count} entries" for name, count in Counter(e.name for e in found).items() if count > 1]
    for encoding in found:
        faults += [f"{encoding.name}: {fault}" for fault in _faults(encoding)]
    if faults:
        more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
        raise ValueError(f"encodings are damaged; quantize the model again: {'; '.join(faults[:8])}{more}")


def _faults(encoding: TensorEncoding) -> Iterable[str]:
    grid = encoding.grid
    if grid is None:
        return
    if not 1 <= grid.bits <= 32:
        yield f"{grid.bits} bits are not from 1 to 32"
        return
    if not encoding.scale or len(encoding.scale) != len(encoding.zero_point):
        yield f"{len(encoding.scale)} scales with {len(encoding.zero_point)} zero points"
    if bad := [value for value in encoding.scale if not (math.isfinite(value) and value > 0)]:
        yield f"scale {bad[0]} is not finite and above 0"
    if bad := [value for value in encoding.zero_point if not grid.qmin <= value <= grid.qmax]:
        yield f"zero point {bad[0]} is not in [{grid.qmin}, {grid.qmax}]"
