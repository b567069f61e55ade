"""Runs a graph on floats, rounding each tensor to its encoding: what the graph says, in plain torch."""

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from optimum_mobilequant.numerics import dequantize, quantize


def constant(graph, name):
    """A constant's values, float32."""
    stored, encoding = graph.constants[name](), graph.values[name].encoding
    return stored if encoding is None else dequantize(stored, *encoding.broadcast(stored.ndim))


def rounded(x, encoding):
    if encoding is None:
        return x
    return dequantize(quantize(x, encoding.scale, encoding.zero_point, encoding.grid), *encoding.broadcast(x.ndim))


def tables(model, plan, length, start=0):
    """cos and sin of positions ``start`` to ``start + length - 1``, ``[1, 1, length, rotary_dims / 2]``."""
    rotary = model.get_submodule(plan.family.rotary)
    half = plan.geometry.rotary_dims // 2
    both = rotary(torch.zeros(1), torch.arange(start, start + length)[None])
    return [table[:, None, :, :half] for table in both]


@torch.no_grad()
def run(graph, model, plan, ids, past=None):
    """All tensors by name.

    Args:
        ids: int64 ``[batch, sequence]``. past: earlier result whose keys and values come before, or None.
    """
    batch, length = ids.shape
    facts, start = graph.facts, 0
    empty = torch.zeros(batch, facts["kv_heads"], 0, facts["head_dim"])
    values = {"input_ids": ids}
    for i in range(facts["layers"]):
        for j, kind in enumerate(("key", "value")):
            name = f"past_{kind}_{i}"
            values[name] = empty
            if past is not None:
                values[name] = torch.cat([past[name], past[graph.outputs[1 + 2 * i + j]]], 2)
                start = values[name].shape[2]
    for name, table in zip(("position_cos", "position_sin"), tables(model, plan, length, start), strict=True):
        values[name] = rounded(table, graph.values[name].encoding)
    values["attention_mask"] = torch.arange(start + length)[None] <= torch.arange(start, start + length)[:, None]
    values |= {name: constant(graph, name) for name in graph.constants}
    for op in graph.ops:
        inputs, encoding = [values[name] for name in op.inputs], graph.values[op.output].encoding
        if op.kind == "mask":
            lowest = -torch.inf if encoding is None else (encoding.grid.qmin - encoding.zero_point) * encoding.scale
            values[op.output] = torch.where(inputs[1], inputs[0], lowest)
        else:
            values[op.output] = rounded(RUN[op.kind](op, *inputs), encoding)
    return values


def _split(op, x):
    return x.unflatten(-1, (op.attributes["heads"], -1)).transpose(1, 2)


def _norm(op, x, gain, bias=0.0):
    x = x - x.mean(-1, keepdim=True) if op.attributes["centre"] else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + op.attributes["eps"]) * gain + bias


def _rope(op, x, cos, sin, shift=0.0):
    half = op.attributes["rotary_dims"] // 2
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1) + shift


def _repeated(op, x):
    return x.repeat_interleave(op.attributes["groups"], 1)


RUN = {
    "embedding": lambda op, ids, table: table[ids],
    "norm": _norm,
    "linear": lambda op, x, weight, bias=None: F.linear(x, weight, bias),
    "split_heads": _split,
    "merge_heads": lambda op, x: x.transpose(1, 2).flatten(2),
    "rope": _rope,
    "concat": lambda op, past, new: torch.cat([past, new], 2),
    "scores": lambda op, q, k: q @ _repeated(op, k).transpose(2, 3),
    "softmax": lambda op, x: x.softmax(-1),
    "context": lambda op, p, v: p @ _repeated(op, v),
    "add": lambda op, a, b: a + b,
    "activation": lambda op, x: ACT2FN[op.attributes["function"]](x),
    "multiply": lambda op, a, b: a * b,
}


def decibels(reference, x):
    """Signal to noise of ``x`` against ``reference``."""
    noise = (reference - x).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise.clamp(min=1e-30)))
