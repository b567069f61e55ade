"""Equal bits on all operands of an operation, for an NPU.

The Hexagon NPU computes with integers where an operator's operands and its result have equal bits; of a product of two
activations the second has 8. Mixed bits it computes in float16: chips without float16 refuse them, and larger graphs
do not compile. That was found by trying each operator on its emulator, see docs/onnx.md. So the form with ``converts``
evens the bits out: 8-bit operands are taken to 16 bits, exactly, and an 8-bit result is rounded to 16 bits over its
own range first and then to its 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...graph import Encoding, Op
from ...graph.ir import Dim
from .emit import Emitter
from .types import refined

Like = str | Encoding | None


def bits(e: Emitter, value: str) -> int | None:
    """Of a tensor of the integer graph; None for floats."""
    encoding = e.encoding(value)
    return None if encoding is None else encoding.grid.bits


def sure(e: Emitter, value: str) -> Encoding:
    """The encoding of a tensor that has one."""
    encoding = e.encoding(value)
    assert encoding is not None
    return encoding


def widened(e: Emitter, source: str) -> tuple[str, Like]:
    """What holds ``source`` in 16 bits, and the grid it is on (``source`` itself where that has 16)."""
    if bits(e, source) == 16:
        return e.read[source], source
    grid = refined(sure(e, source))
    return e.converted(e.read[source], f"{source}.wide", grid, source), grid


def even(e: Emitter, op: Op, sources: Sequence[str]) -> tuple[list[str], list[Like], bool]:
    """What an operation with these operands reads, on which grids, and whether its result is rounded late."""
    found = {bits(e, name) for name in (*sources, op.output)}
    if not e.form.converts or len(found) == 1 or None in found:
        return [e.read[name] for name in sources], list(sources), False
    pairs = [widened(e, name) for name in sources]
    return [x for x, _ in pairs], [grid for _, grid in pairs], bits(e, op.output) == 8


def computed(
    e: Emitter,
    op: Op,
    kind: str,
    inputs: Sequence[str],
    late: bool,
    shape: tuple[Dim, ...] | None = None,
    grid: Encoding | None = None,
    **attributes: Any,
) -> None:
    """The operation's output by one node.

    Args:
        late: in 16 bits over the output's range first, then on the output's own 8-bit grid.
        shape: of the node's result, where it is not the output's.
        grid: the 16-bit one to use when late, where it is not the refined one of the output.
    """
    if shape is None and not late:
        e.result(op, kind, inputs, **attributes)
        return
    like: Like = op.output
    if late:
        like = refined(sure(e, op.output)) if grid is None else grid
    made = e.inner(op, "product", kind, inputs, like, shape or e.shape(op.output), **attributes)
    if shape is None:
        e.result(op, None, [made])
        return
    if late:
        made = e.converted(made, f"{op.name}.narrow", sure(e, op.output), op.output)
    e.reshape(op, None, made, e.shape(op.output), op.output)
