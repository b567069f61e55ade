"""A decoder layer of :mod:`.steps`: what serves it where the kernels cannot be compiled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph.ir import Graph, Op
from ..kernels import onednn
from ..plan import Plan
from .blocks import NotFused, table_of
from .cache import PlainCacheLayer
from .layer import LayerKernel
from .steps import Attention, Norm, Product, Range, added_steps, look_up

_PRODUCTS = ("qkv", "proj", "gate_up", "down")


class StepLayer(LayerKernel):
    """One decoder layer; the codes of its weights live here, in oneDNN's layout.

    Raises:
        NotFused: something in the layer has no place in it: 16-bit operands of a product, a 16-bit cache.
    """

    cache_kind = PlainCacheLayer

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        index: int,
        producers: Mapping[str, Op],
        prefix: tuple[Tensor, Tensor] | None,
    ):
        super().__init__(index, plan.geometry.kv_heads, plan.geometry.head_dim, prefix)
        f, g = plan.family, plan.geometry
        attention, root = f.layer(index, f.attention), f.layer(index)

        def linear(part: str) -> Op:
            return producers[f"{f.layer(index, part)}.output"]

        def head_norm(name: str | None) -> Norm | None:
            return Norm(graph, producers[f"{attention}.{name}.output"]) if name else None

        def grid(name: str) -> Range:
            return Range.of(graph, name)

        self.qkv = Product(graph, (linear(f.query), linear(f.key), linear(f.value)))
        self.proj = Product(graph, (linear(f.out),))
        self.gate_up = Product(graph, (linear(f.gate), linear(f.up)), codes=True)
        self.down = Product(graph, (linear(f.down),))
        self.norm1 = Norm(graph, producers[f"{f.layer(index, f.input_norm)}.output"], unit=1.0)
        self.norm2 = Norm(graph, producers[f"{f.layer(index, f.mlp_norm)}.output"])
        names = ("query_rotated", "key_rotated", "scores", "probabilities", "context")
        query, key, scores, probabilities, context = (grid(f"{attention}.{name}") for name in names)
        value = grid(f"{f.layer(index, f.value)}.output")
        if (key.bits, value.bits) != (8, 8):
            raise NotFused("a KV cache of 16 bits")
        self.attention = Attention(
            query, key, value, scores, probabilities, context, g.rotary_dims // 2, head_norm(f.query_norm),
            head_norm(f.key_norm), added_steps(graph, producers[f"{attention}.key_rotated"]),
        )  # fmt: skip
        self.middle, self.out = grid(f"{f.layer(index, f.mlp_norm)}.input"), grid(f"{root}.output")
        product = producers[f"{f.layer(index, f.down)}.input"]
        activated = producers[product.inputs[0]]
        act, up, self.product = (grid(name) for name in (*product.inputs, product.output))
        table = table_of(graph, activated)
        self.up_zero = up.zero
        for name in _PRODUCTS:
            packed = getattr(self, name).packed
            for part in ("weight", "bias", "multiplier"):
                self.register_buffer(f"{name}_{part}", getattr(packed, part), persistent=False)
        self.register_buffer("table", table.float() * (act.scale * up.scale / self.product.scale), persistent=False)

    table: Tensor

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
    ) -> Tensor:
        """As :meth:`.layer.PackedLayer.forward`."""
        x = x.float()
        held, mask = self.open(x, attention_mask, past_key_values)
        if not x.numel():
            return x
        steps = self.qkv(self.norm1.out.codes(self.norm1(x)))
        context = self.attend(steps, held, mask, *(t.float() for t in position_embeddings))
        added = self.proj(context)
        middle = x * (1 / self.middle.scale)
        middle.add_(added, alpha=self.proj.parts[0].scale / self.middle.scale)
        self.middle.round_(middle)
        gate, up = self.gate_up(self.norm2.out.codes(self.norm2(middle))).split(self.gate_up.sizes, -1)
        product = up.float().sub_(self.up_zero).mul_(look_up(self.table, gate))
        added = self.down(self.product.codes(product))
        middle.mul_(self.middle.scale / self.out.scale).add_(added, alpha=self.down.parts[0].scale / self.out.scale)
        return self.out.round_(middle).mul_(self.out.scale)

    def attend(self, steps: Tensor, held: PlainCacheLayer, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Context codes of the steps of query, key and value ``[batch, sequence, channels]``."""
        k = self.attention
        parts = zip(steps.split(self.qkv.sizes, -1), (-1, self.kv_heads, self.kv_heads), strict=True)
        query, key, value = (t.unflatten(-1, (heads, self.head_dim)).transpose(1, 2) for t, heads in parts)
        grids = self.qkv.parts
        query = k.rotated(query, k.query_norm, grids[0], k.query, cos, sin)
        key = k.rotated(key, k.key_norm, grids[1], k.key, cos, sin, k.shift)
        held.append(key.add_(k.key.zero - 128), value + (k.value.zero - 128))
        return k.attend(query, *held.held(), mask)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        product: Product = getattr(self, name)
        return (onednn.unpack(product.spec, product.packed) + product.zero_points[:, None]).to(torch.int8)[ids]

    def __deepcopy__(self, memo: dict[int, Any]) -> StepLayer:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name in _PRODUCTS:
            weight = getattr(self, name).packed.weight
            memo[id(weight)] = weight.clone()  # torch copies these with clone() only
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new
