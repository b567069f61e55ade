"""The constants of a fused decoder layer: one block of bytes that starts with named numbers, and the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.ir import Graph, Op
from ..graph.operators import Static, encoding_of, shift_of
from ..kernels import LinearSpec, Output, cpp
from ..kernels.reference import pack_multiplier
from ..kernels.spec import Weights
from ..numerics.integer import Multiplier
from ..numerics.integer_elementwise import lookup_table, shared_multipliers
from ..numerics.integer_rows import ExpTables, NormConstants
from ..plan import Plan
from .linear import KERNEL_BITS

_ALIGNMENT = 64
_LARGEST_HEAD = 1024  # of the kernel's stack


class NotFused(ValueError):
    """Why a layer cannot be computed by the fused kernel."""


@dataclass(frozen=True)
class FusedLinear:
    """Linears that read the same tensor, as one: the parts' output channels follow each other.

    Args:
        paths: modules, in order. codes: int8 ``[out, in]``. bits: of the codes.
    """

    paths: tuple[str, ...]
    codes: Tensor
    bits: int

    @property
    def spec(self) -> LinearSpec:
        rows, columns = self.codes.shape
        return LinearSpec(self.bits, 8, True, columns, rows, "cpu", Output.totals())


@dataclass(frozen=True)
class LayerBlock:
    """What the kernel needs of one layer: constants (uint8) and its four products."""

    constants: Tensor
    linears: tuple[FusedLinear, FusedLinear, FusedLinear, FusedLinear]


class Block:
    """Collects numbers and arrays, and lays them out."""

    def __init__(self, fields: Sequence[str]):
        self.fields = fields
        self.numbers: dict[str, int] = {}
        self.arrays: dict[str, Tensor] = {}

    def put(self, prefix: str, **values: int | bool | Tensor | None) -> None:
        for name, value in values.items():
            key = f"{prefix}_{name}" if prefix else name
            if isinstance(value, Tensor):
                self.arrays[key] = value.contiguous()
            else:
                self.numbers[key] = int(value or 0)

    def build(self) -> Tensor:
        """uint8: the numbers in the order of ``fields``, then the arrays, whose numbers are their offsets."""
        given = self.numbers.keys() | self.arrays.keys()
        if given != set(self.fields):
            raise RuntimeError(f"fields of the kernel and of its caller differ: {sorted(given ^ set(self.fields))}")
        end, parts, offsets = len(self.fields) * 8, [], {}
        for key, array in self.arrays.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            data = array.reshape(-1).view(torch.uint8)
            parts.append((start, data))
            offsets[key], end = start, start + data.numel()
        head = torch.tensor([{**self.numbers, **offsets}[name] for name in self.fields], dtype=torch.int64)
        memory = torch.zeros(end + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        shift = -memory.data_ptr() % _ALIGNMENT
        out = memory[shift : shift + end]
        out[: head.numel() * 8] = head.view(torch.uint8)
        for start, data in parts:
            out[start : start + data.numel()] = data
        return out


def norm_numbers(graph: Graph, op: Op) -> dict[str, int | bool | Tensor | None]:
    """Numbers of a norm, named as in ``layer.cpp``."""
    out = Static(graph, op.output)
    constants = norm_constants(graph, op)
    gain = torch.stack([constants.gain.mantissa, constants.gain.shift]).to(torch.int32)
    return {
        "width": constants.width, "centre": constants.centre, "fraction": constants.fraction,
        "epsilon": constants.epsilon, "gain": gain, "bias": constants.bias, "zero": out.zero, "qmax": out.grid.qmax,
    }  # fmt: skip


def norm_constants(graph: Graph, op: Op) -> NormConstants:
    """Constants of a norm of the graph."""
    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    gain = encoding_of(graph, op.inputs[1])
    steps = graph.constants[op.inputs[1]]().to(torch.int64) - gain.zero_point
    return NormConstants.of(
        steps.to(torch.float64) * gain.scale.to(torch.float64),
        in_scale=x.scale, in_bound=x.bound, out_scale=out.scale, eps=float(op.attributes["eps"]),
        centre=bool(op.attributes["centre"]),
        bias=graph.constants[op.inputs[2]]() if len(op.inputs) == 3 else None,
    )  # fmt: skip


def _linear(block: Block, prefix: str, graph: Graph, ops: Sequence[Op]) -> FusedLinear:
    """Put the numbers of linears that read the same tensor; their weights are returned."""
    x = Static(graph, ops[0].inputs[0])
    codes, bias, factor, zeros, low, high = [], [], [], [], [], []
    bits = max(encoding_of(graph, op.inputs[1]).grid.bits for op in ops)
    if bits not in KERNEL_BITS:
        raise NotFused(f"{ops[0].name} has {bits}-bit weights, and kernels take up to 8")
    bits = KERNEL_BITS[bits]  # narrower codes beside wider ones are stored like these
    for op in ops:
        encoding, out = encoding_of(graph, op.inputs[1]), Static(graph, op.output)
        weight = graph.constants[op.inputs[1]]()
        rows = weight.shape[0]
        zero = encoding.zero_point.to(torch.int32).expand(rows)
        given = graph.constants[op.inputs[2]]() if len(op.inputs) == 3 else None
        scale = encoding.scale.expand(rows)
        weights = Weights(weight, scale, zero if bool(zero.any()) else None, given, x.scale, x.zero)
        spec = LinearSpec(8, x.grid.bits, True, weight.shape[1], rows, "cpu", Output.totals())
        if x.grid.bits == 8 and weights.largest_total(spec) >= 2**31:
            raise NotFused(f"the sums of {op.name} can leave int32")
        codes.append(weight)
        bias.append(weights.folded_bias())
        factor.append(x.scale * scale.to(torch.float64) / out.scale)
        zeros.append(zero)
        low.append(torch.full((rows,), -out.zero, dtype=torch.int32))
        high.append(torch.full((rows,), out.grid.qmax - out.zero, dtype=torch.int32))
    folded, zero = torch.cat(bias), torch.cat(zeros)
    if x.grid.bits == 8:  # intermediate sums wrap around, their end does not
        folded = ((folded + 2**31) % 2**32 - 2**31).to(torch.int32)
    joined = torch.cat(codes)
    block.put(
        prefix, **{"in": joined.shape[1]}, out=joined.shape[0], bits=bits, planes=x.grid.bits // 8, bias=folded,
        multiplier=pack_multiplier(torch.cat(factor), Output(torch.int32, 1)), low=torch.cat(low),
        high=torch.cat(high), weight_zero=zero if bool(zero.any()) else None,
    )  # fmt: skip
    return FusedLinear(tuple(op.name for op in ops), joined, bits)


def _rotation(block: Block, prefix: str, graph: Graph, op: Op) -> None:
    x, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    multiplier = Multiplier.of(x.scale * 2.0**-14 / out.scale)
    block.put(
        prefix, mantissa=int(multiplier.mantissa), shift=int(multiplier.shift), zero=out.zero, qmax=out.grid.qmax
    )


def _product(block: Block, prefix: str, scale: float, out: Static) -> None:
    multiplier = Multiplier.of(scale / out.scale)
    block.put(
        prefix, mantissa=int(multiplier.mantissa), shift=int(multiplier.shift), zero=out.zero, qmax=out.grid.qmax
    )


def _sum(block: Block, prefix: str, graph: Graph, op: Op) -> None:
    a, b, out = (Static(graph, name) for name in (*op.inputs, op.output))
    first, second, shift = shared_multipliers(a.scale / out.scale, b.scale / out.scale)
    block.put(prefix, first=first, second=second, shift=shift)


# Operations of one layer: those that the kernel computes, and no other.
_OPERATIONS = Counter(
    norm=2, linear=7, split_heads=3, rope=2, concat=2, scores=1, mask=1, softmax=1, context=1, merge_heads=1, add=2,
    activation=1, multiply=1,
)  # fmt: skip


def check_operations(graph: Graph, plan: Plan) -> None:
    """Refuse a graph in which the kernel would leave something out.

    Raises:
        NotFused: names the operations that it does not know.
    """
    layers, f = plan.geometry.layers, plan.family
    expected = Counter({kind: count * layers for kind, count in _OPERATIONS.items()})
    expected.update(embedding=1, norm=1 + 2 * layers * (f.query_norm is not None), linear=1)
    found = Counter(op.kind for op in graph.ops)
    if found != expected:
        kinds = sorted((found - expected).keys() | (expected - found).keys())
        raise NotFused(f"its layers have other operations than the kernel computes: {', '.join(kinds)}")


def layer_block(graph: Graph, plan: Plan, index: int, producers: Mapping[str, Op]) -> LayerBlock:
    """The constants of one layer.

    Args:
        graph: of the model. index: of the layer. producers: output name -> operation of the graph.

    Raises:
        NotFused: the layer has something that the kernel does not compute.
    """
    f, g = plan.family, plan.geometry
    attn, root = f.layer(index, f.attention), f.layer(index)
    if g.head_dim > _LARGEST_HEAD:
        raise NotFused(f"heads of {g.head_dim} dimensions; the kernel takes up to {_LARGEST_HEAD}")

    def made(path: str) -> Op:
        return producers[path]

    def linear(part: str) -> Op:
        return made(f"{f.layer(index, part)}.output")

    block = Block(cpp.library().layer_fields())
    norm1, norm2 = made(f"{f.layer(index, f.input_norm)}.output"), made(f"{f.layer(index, f.mlp_norm)}.output")
    middle, last = made(f"{f.layer(index, f.mlp_norm)}.input"), made(f"{root}.output")
    source, mid, out = (Static(graph, name) for name in (norm1.inputs[0], middle.output, last.output))
    block.put(
        "", hidden=g.hidden, heads=g.heads, kv_heads=g.kv_heads, dims=g.head_dim, half=g.rotary_dims // 2, mlp=g.mlp,
        scales=torch.tensor([source.scale, out.scale], dtype=torch.float32), in_zero=source.zero,
        in_qmax=source.grid.qmax, middle_zero=mid.zero, middle_qmax=mid.grid.qmax, out_zero=out.zero,
        out_qmax=out.grid.qmax,
    )  # fmt: skip
    block.put("norm1", **norm_numbers(graph, norm1))
    block.put("norm2", **norm_numbers(graph, norm2))
    qkv = _linear(block, "qkv", graph, [linear(f.query), linear(f.key), linear(f.value)])
    has_norms = f.query_norm is not None
    block.put("", has_head_norms=has_norms)
    for prefix, name in (("query_norm", f.query_norm), ("key_norm", f.key_norm)):
        numbers = norm_numbers(graph, made(f"{attn}.{name}.output")) if name else dict.fromkeys(_NORM, 0)
        block.put(prefix, **numbers)
    query, key = Static(graph, f"{attn}.query_rotated"), Static(graph, f"{attn}.key_rotated")
    value = Static(graph, f"{f.layer(index, f.value)}.output")
    if (key.grid.bits, value.grid.bits) != (8, 8):
        raise NotFused("a KV cache of 16 bits")
    _rotation(block, "query", graph, made(f"{attn}.query_rotated"))
    _rotation(block, "key", graph, made(f"{attn}.key_rotated"))
    shift = shift_of(graph, made(f"{attn}.key_rotated"))
    block.put("key", addend=None if shift is None else shift.to(torch.int32))  # codes of 16 bits by up to 2**16
    block.put("", query_planes=query.grid.bits // 8, value_zero=value.zero)
    scores, masked = Static(graph, f"{attn}.scores"), Static(graph, f"{attn}.masked_scores")
    probabilities, context = Static(graph, f"{attn}.probabilities"), Static(graph, f"{attn}.context")
    _product(block, "score", query.scale * key.scale, scores)
    exp = ExpTables.of(masked.scale)
    block.put(
        "", score_move=masked.zero - scores.zero, exp_high=exp.high.to(torch.int32), exp_low=exp.low.to(torch.int32),
        probability_qmax=probabilities.grid.qmax,
    )  # fmt: skip
    _product(block, "context", probabilities.scale * value.scale, context)
    proj = _linear(block, "proj", graph, [linear(f.out)])
    _sum(block, "sum1", graph, middle)
    gate_up = _linear(block, "gate_up", graph, [linear(f.gate), linear(f.up)])
    product = made(f"{f.layer(index, f.down)}.input")
    activated = made(product.inputs[0])
    gate, act, up = (Static(graph, name) for name in (activated.inputs[0], activated.output, product.inputs[1]))
    block.put("", table=table_of(graph, activated), gate_zero=gate.zero)
    block.put("product", wide=act.grid.bits + up.grid.bits > 24)
    _product(block, "product", act.scale * up.scale, Static(graph, product.output))
    down = _linear(block, "down", graph, [linear(f.down)])
    _sum(block, "sum2", graph, last)
    return LayerBlock(block.build(), (qkv, proj, gate_up, down))


_NORM = ("width", "centre", "fraction", "epsilon", "gain", "bias", "zero", "qmax")


def table_of(graph: Graph, op: Op) -> Tensor:
    """The activation function at every code of the gate, int32, in steps from the output's zero point."""
    from transformers.activations import ACT2FN

    gate, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    function = ACT2FN[str(op.attributes["function"])]
    codes = lookup_table(function, gate.tensor, gate.zero, gate.grid, (out.tensor, out.zero, out.grid))
    return codes.to(torch.int32) - out.zero
