"""Each kind of operation as a function on integer codes. A row of :data:`PREPARE` per key of ``ir.KINDS``.

Preparing an operation turns its scales into multipliers and tables; the function it returns takes the codes of the
operation's inputs that are no constants, in their order, and returns the codes of its output. Between the two there is
no float.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..numerics.integer import Multiplier, Operand, centred, integer_matmul, requantize, to_grid
from ..numerics.integer_elementwise import (
    look_up,
    lookup_table,
    rescaled_sum,
    rotate_pairs,
    shared_multipliers,
    shift_step,
)
from ..numerics.integer_rows import ExpTables, NormConstants, integer_softmax, normalise
from .ir import Encoding, Graph, Op

Function = Callable[..., Tensor]


def prepare(graph: Graph, op: Op) -> Function:
    """The function of one operation.

    Raises:
        ValueError: a kind that is unknown here, or a tensor without an encoding.
    """
    if op.kind not in PREPARE:
        raise ValueError(f'no integer arithmetic for operations of kind "{op.kind}" ({op.name})')
    return PREPARE[op.kind](graph, op)


def encoding_of(graph: Graph, name: str) -> Encoding:
    """Encoding of a tensor.

    Raises:
        ValueError: it has none, as in a model whose activations stay float.
    """
    encoding = graph.values[name].encoding
    if encoding is None:
        raise ValueError(f"{name} has no encoding: only a model with static activations runs on integers")
    return encoding


class Static:
    """A per-tensor encoding as Python numbers."""

    def __init__(self, graph: Graph, name: str):
        encoding = encoding_of(graph, name)
        if encoding.per_channel:
            raise ValueError(f"{name} has one scale for each channel; activations have one in all")
        self.tensor, self.scale, self.zero = encoding.scale, float(encoding.scale), int(encoding.zero_point)
        self.grid = encoding.grid

    def codes(self, steps: Tensor) -> Tensor:
        return to_grid(steps, self.zero, self.grid)

    def centred(self, codes: Tensor) -> Tensor:
        return centred(codes, self.zero)

    def operand(self, codes: Tensor) -> Operand:
        return Operand.of(codes, self.zero, self.grid)

    @property
    def bound(self) -> int:
        return max(self.zero - self.grid.qmin, self.grid.qmax - self.zero)


def _embedding(graph: Graph, op: Op) -> Function:
    table = graph.constants[op.inputs[1]]()
    return lambda ids: table[ids]


def _norm(graph: Graph, op: Op) -> Function:
    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    gain = encoding_of(graph, op.inputs[1])
    steps = graph.constants[op.inputs[1]]().to(torch.int64) - gain.zero_point
    constants = NormConstants.of(
        steps.to(torch.float64) * gain.scale.to(torch.float64),
        in_scale=x.scale,
        in_bound=x.bound,
        out_scale=out.scale,
        eps=float(op.attributes["eps"]),
        centre=bool(op.attributes["centre"]),
        bias=graph.constants[op.inputs[2]]() if len(op.inputs) == 3 else None,
    )
    return lambda codes: out.codes(normalise(x.centred(codes), constants))


def _linear(graph: Graph, op: Op) -> Function:
    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    encoding = encoding_of(graph, op.inputs[1])
    weight = Operand.of(graph.constants[op.inputs[1]]().t(), encoding.zero_point, encoding.grid)
    bias = graph.constants[op.inputs[2]]().to(torch.int64) if len(op.inputs) == 3 else None
    multiplier = Multiplier.of(x.scale * encoding.scale.to(torch.float64) / out.scale)
    return lambda codes: out.codes(requantize(integer_matmul(x.operand(codes), weight, bias=bias), multiplier))


def _split_heads(graph: Graph, op: Op) -> Function:
    heads = int(op.attributes["heads"])
    return lambda codes: codes.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(graph: Graph, op: Op) -> Function:
    return lambda codes: codes.transpose(1, 2).flatten(-2)


def _rope(graph: Graph, op: Op) -> Function:
    x, cos, sin = (Static(graph, name) for name in op.inputs[:3])
    out, dims = Static(graph, op.output), int(op.attributes["rotary_dims"])
    multiplier = Multiplier.of(x.scale * 2.0**-14 / out.scale)
    if (cos.scale, sin.scale, cos.zero, sin.zero) != (2.0**-14, 2.0**-14, 0, 0):
        raise ValueError(f"the rotary tables of {op.name} are not on the Q1.14 grid")
    shift = shift_of(graph, op)

    def run(codes: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rotate_pairs(x.centred(codes), cos.to(torch.int64), sin.to(torch.int64), dims)
        turned = turned if shift is None else turned + shift
        return out.codes(requantize(turned, multiplier))

    return run


def shift_of(graph: Graph, op: Op) -> Tensor | None:
    """What a rotation adds, int64 ``[heads, 1, head_dim]`` in steps of its input times 2**14; None if it adds nothing.

    Raises:
        ValueError: the constant is not on the grid that belongs to the input's.
    """
    if len(op.inputs) == 3:
        return None
    x, shift = Static(graph, op.inputs[0]), Static(graph, op.inputs[3])
    if shift.zero or shift.tensor != x.tensor * shift_step(x.grid.bits):
        raise ValueError(f"the constant that {op.name} adds is not on a grid of its input's steps")
    return graph.constants[op.inputs[3]]().to(torch.int64) << x.grid.bits


def _concat(graph: Graph, op: Op) -> Function:
    return lambda past, new: torch.cat([past, new], dim=2)


def _attention_product(graph: Graph, op: Op, transposed: bool) -> Function:
    a, b, out = Static(graph, op.inputs[0]), Static(graph, op.inputs[1]), Static(graph, op.output)
    multiplier = Multiplier.of(a.scale * b.scale / out.scale)

    def run(left: Tensor, right: Tensor) -> Tensor:
        # The query heads that share a KV head are rows of one product.
        batch, heads, length, inner = left.shape
        rows = left.reshape(batch, right.shape[1], heads // right.shape[1] * length, inner)
        right = right.transpose(2, 3) if transposed else right
        product = requantize(integer_matmul(a.operand(rows), b.operand(right)), multiplier)
        return out.codes(product.view(batch, heads, length, -1))

    return run


def _mask(graph: Graph, op: Op) -> Function:
    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    move = out.zero - x.zero

    def run(codes: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible.to(torch.bool), codes.to(out.grid.dtype) + move, out.grid.qmin).to(out.grid.dtype)

    return run


def _softmax(graph: Graph, op: Op) -> Function:
    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    if out.zero != 0 or out.tensor != torch.tensor(1.0 / out.grid.qmax):
        raise ValueError(f"the probabilities of {op.name} are not on the grid from 0 to 1")
    exp = ExpTables.of(x.scale)
    return lambda codes: out.codes(integer_softmax(codes, exp, out.grid.qmax))


def _add(graph: Graph, op: Op) -> Function:
    a, b, out = Static(graph, op.inputs[0]), Static(graph, op.inputs[1]), Static(graph, op.output)
    multipliers = shared_multipliers(a.scale / out.scale, b.scale / out.scale)
    return lambda x, y: out.codes(rescaled_sum(a.centred(x), b.centred(y), multipliers))


def _multiply(graph: Graph, op: Op) -> Function:
    a, b, out = Static(graph, op.inputs[0]), Static(graph, op.inputs[1]), Static(graph, op.output)
    multiplier = Multiplier.of(a.scale * b.scale / out.scale)
    return lambda x, y: out.codes(requantize(a.centred(x) * b.centred(y), multiplier))


def _activation(graph: Graph, op: Op) -> Function:
    from transformers.activations import ACT2FN

    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    table = lookup_table(
        ACT2FN[str(op.attributes["function"])], x.tensor, x.zero, x.grid, (out.tensor, out.zero, out.grid)
    )
    return lambda codes: look_up(codes, table, x.grid)


PREPARE: dict[str, Callable[[Graph, Op], Function]] = {
    "embedding": _embedding,
    "norm": _norm,
    "linear": _linear,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "rope": _rope,
    "concat": _concat,
    "scores": partial(_attention_product, transposed=True),
    "mask": _mask,
    "softmax": _softmax,
    "context": partial(_attention_product, transposed=False),
    "add": _add,
    "activation": _activation,
    "multiply": _multiply,
}
