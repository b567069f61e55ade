"""Give 16 bits to 8-bit tensors where a target cannot multiply with 8.

An encodings file states one encoding for each tensor, so a conversion between a producer and a consumer, which a graph
of quantize-dequantize pairs can hold, cannot be written there. Instead the tensor itself gets 16 bits over the same
range: every 8-bit value is on the finer grid, and nothing saturates that did not before. The result is no longer
rounded to 8 bits there, so it is at least as precise as the simulation, not equal to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...graph.ir import Encoding, Graph
from ...numerics import Grid
from .check import findings
from .rules import Target

# Codes 0..255 times this are 0..65535.
_STEPS = 65535 // 255


def widen_graph(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """A graph without operations that the target runs with 16 bits only.

    Returns:
        the graph, which shares with the given one what did not change, and the names of the tensors that got 16 bits,
        without those that only hold moved data.
    """
    graph, widened = replace(graph, values=dict(graph.values), constants=dict(graph.constants)), []
    while found := findings(graph, target).widen:
        op, rule = found[0]
        for operand in rule.widen:
            root = op.output if operand == "output" else op.inputs[0]
            while (source := graph.values[root].moved_from) is not None:
                root = source
            _widen(graph, root)
            widened.append(root)
    return graph, widened


def _widen(graph: Graph, root: str) -> None:
    """Change ``root``, what is moved from it, and the constants whose codes depend on its scale."""
    if root in graph.outputs or root in graph.inputs:
        raise RuntimeError(f"{root} is an input or output of the graph, whose type callers know")
    changed = {root}
    for name, value in graph.values.items():  # in the order of the data flow
        if value.moved_from in changed:
            changed.add(name)
    for name in changed:
        _restate(graph, name, signed=False)
    for op in graph.ops:
        if op.kind == "embedding" and op.output in changed:
            _restate(graph, op.inputs[1], signed=False)
        if op.kind == "linear" and op.inputs[0] in changed and len(op.inputs) == 3:
            _restate(graph, op.inputs[2], signed=True)


def _restate(graph: Graph, name: str, *, signed: bool) -> None:
    """The same values on steps a 257th as large."""
    value = graph.values[name]
    assert value.encoding is not None
    bits = 32 if signed else 16
    if value.encoding.grid.bits == bits and not signed:
        raise RuntimeError(f"{name} has 16 bits already")
    old = value.encoding
    encoding = Encoding(old.scale / _STEPS, old.zero_point * _STEPS, Grid(bits, signed))
    graph.values[name] = replace(value, encoding=encoding)
    if name in graph.constants:
        graph.constants[name] = _multiplied(name, graph.constants[name], encoding.grid)


def _multiplied(name: str, read: Callable[[], Tensor], grid: Grid) -> Callable[[], Tensor]:
    def codes() -> Tensor:
        wide = read().to(torch.int64) * _STEPS
        if bool(((wide < grid.qmin) | (wide > grid.qmax)).any()):
            raise ValueError(
                f"{name} does not fit in {grid.bits} bits behind a 16-bit input: use preset w8a16 or w4a16"
            )
        return wide.to(grid.dtype)

    return codes
