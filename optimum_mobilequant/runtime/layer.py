"""Decoder layers computed by one fused kernel each: codes inside, floats on the residual grid between them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..graph.ir import Graph, Op
from ..kernels import LinearSpec, cpp
from ..kernels.cpp.memory import copy_packed
from ..kernels.spec import Packed
from ..nn import QWeight
from ..plan import Plan
from .blocks import Block, LayerBlock, NotFused, check_operations, layer_block, norm_numbers
from .cache import PANEL, IntegerCacheLayer, integer_layer

_NAMES = ("qkv", "proj", "gate_up", "down")


class FusedLinears(nn.Module):
    """Base of modules that own packed weights: nothing of theirs is cast, moved or saved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinears:
        return self


class LayerKernel(FusedLinears, ABC):
    """What computes a decoder layer, and owns its weights' codes.

    Args:
        index: of the layer. kv_heads, head_dim: of its attention.
        prefix: codes of the keys and values that stand before every text, ``[kv_heads, length, dims]``, or None.
    """

    cache_kind: type[IntegerCacheLayer]

    def __init__(self, index: int, kv_heads: int, head_dim: int, prefix: tuple[Tensor, Tensor] | None):
        super().__init__()
        self.index, self.kv_heads, self.head_dim, self.prefix = index, kv_heads, head_dim, prefix

    @abstractmethod
    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Codes of some output channels of one of its products, int8 ``[*ids.shape, in]``."""

    def take(self, weights: Mapping[str, tuple[QWeight, ...]]) -> None:
        """Take over the codes of the layer's weights: those of each fused product, in their order."""
        for name, parts in weights.items():
            start = 0
            for weight in parts:
                weight.hand_over(Slice(self, name, start, start + weight.shape[0]))
                start += weight.shape[0]

    def open(self, x: Tensor, mask: Tensor | None, past_key_values: Any) -> tuple[Any, Tensor | None]:
        """The layer's cache, with room for ``x``, and the mask, additive and with the prefix."""
        batch, sequence, _ = x.shape
        if past_key_values is None:
            held = self.cache_kind(self.kv_heads, self.head_dim, PANEL)
        else:
            held = integer_layer(past_key_values, self.index, self.kv_heads, self.head_dim, self.cache_kind)
        held.begin(batch, self.prefix, x.device)
        held.reserve(batch, sequence, x.device)
        mask = additive(mask)
        if mask is not None and held.front:
            mask = F.pad(mask, (held.front, 0))  # every position sees the prefix
        return held, mask


class Slice:
    """Some output channels of a fused weight: what :class:`~..nn.QWeight` reads its codes from."""

    def __init__(self, owner: LayerKernel, name: str, start: int, stop: int):
        self.owner, self.name, self.start, self.stop = owner, name, start, stop

    def codes(self) -> Tensor:
        return self.rows(torch.arange(self.stop - self.start))

    def rows(self, ids: Tensor) -> Tensor:
        return self.owner.rows(self.name, ids + self.start)


class PackedLayer(LayerKernel):
    """The compiled kernel of one decoder layer; its weights' codes live here, packed.

    Buffers: ``constants`` uint8, and the packed ``qkv``, ``proj``, ``gate_up`` and ``down``.
    """

    constants: Tensor
    cache_kind = IntegerCacheLayer

    def __init__(
        self, block: LayerBlock, index: int, kv_heads: int, head_dim: int, prefix: tuple[Tensor, Tensor] | None
    ):
        super().__init__(index, kv_heads, head_dim, prefix)
        self.specs: dict[str, LinearSpec] = {}
        self.register_buffer("constants", block.constants, persistent=False)
        for name, linear in zip(_NAMES, block.linears, strict=True):
            self.specs[name] = linear.spec
            packed = cpp.library().pack(linear.codes.contiguous(), linear.bits)
            self.register_buffer(name, packed, persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name in _NAMES:
            weight = getattr(self, name)
            memo[id(weight)] = copy_packed(weight)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def rows(self, name: str, ids: Tensor) -> Tensor:
        weight = getattr(self, name)
        return cpp.unpack_rows(self.specs[name], Packed(weight, weight, weight, None, 0), ids)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
    ) -> Tensor:
        """One layer.

        Args:
            x: ``[batch, sequence, hidden]``, values on the layer's input grid.
            attention_mask: ``[batch or 1, 1, sequence, at least total]``: bool (True is visible) or additive (below 0
                is hidden); None hides what comes later.
            position_embeddings: cos and sin ``[batch or 1, sequence, rotary dims]``, on the Q1.14 grid.
            past_key_values: cache of transformers, or None.
        """
        held, mask = self.open(x, attention_mask, past_key_values)
        cos, sin = position_embeddings
        out: Tensor = torch.ops.mobilequant.decoder_layer(
            x.float().contiguous(), mask, cos.float().contiguous(), sin.float().contiguous(),
            held.keys, held.key_sums, held.values, held.length, self.constants, self.qkv, self.proj, self.gate_up,
            self.down,
        )  # fmt: skip
        held.length += x.shape[1]
        return out


def additive(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernel reads it: float32, contiguous, below 0 where hidden."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = mask.float() - 1.0
    return mask.float().contiguous()


class FusedForward:
    """Mixed in before a decoder layer's class: its ``forward`` is the packed kernel's."""

    fused: LayerKernel

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,  # what past_key_values is called since transformers 5.24
        **kwargs: Any,  # options of other attentions, as the decoder layers of transformers take them
    ) -> Tensor:
        if kwargs.get("output_attentions"):
            raise ValueError(
                'fused layers keep no attention probabilities; call set_backend(model, "simulate") to see them'
            )
        if position_embeddings is None:
            raise ValueError("a fused layer takes position_embeddings: (cos, sin) from the model's rotary module")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:  # rather than to generate as if each token were the first
            raise RuntimeError(
                f"this transformers hands its cache to decoder layers by another name (one of {sorted(kwargs)}); "
                'call set_backend(model, "simulate") and report it'
            )
        out: Tensor = self.fused(hidden_states, attention_mask, position_embeddings, cache)
        return out


@cache
def fused_class(kind: Any) -> type[nn.Module]:
    """Subclass of a decoder layer's class that computes with the kernel; the same one for each class."""
    return type(f"Fused{kind.__name__}", (FusedForward, kind), {"fused_from": kind})


class PackedNorm(FusedLinears):
    """A norm on integers: floats on its input's grid in, float32 values on its output's grid out.

    Args:
        constants: what ``mq_norm`` reads.
    """

    constants: Tensor

    def __init__(self, constants: Tensor):
        super().__init__()
        self.register_buffer("constants", constants, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mobilequant.norm(x.float().contiguous(), self.constants)
        return out


_NORM_FIELDS = ("scales", "in_zero", "in_qmax", "unused", "width", "centre", "fraction", "epsilon", "gain", "bias",
                "zero", "qmax")  # fmt: skip


def fuse(model: PreTrainedModel, plan: Plan, backend: str) -> None:
    """Swap every decoder layer (and for ``"cpp"`` the final norm) for kernels, which take over the layers' codes.

    Args:
        backend: ``"cpp"``, or ``"onednn"`` for layers of torch's own operators.

    Raises:
        NotFused: something in the model has no place in the kernel; nothing was changed.
    """
    from ..graph.build import build_graph

    f, g = plan.family, plan.geometry
    try:
        graph = build_graph(model, plan)
    except ValueError as error:
        raise NotFused(str(error)) from None
    check_operations(graph, plan)
    producers = {op.output: op for op in graph.ops}
    final = _final_norm(graph, producers[f"{f.final_norm}.output"]) if backend == "cpp" else None
    packed: list[LayerKernel] = []
    try:
        for i in range(g.layers):
            prefix = (graph.prefix[f"past_key_{i}"], graph.prefix[f"past_value_{i}"]) if graph.prefix else None
            made = _layer(graph, plan, i, producers, prefix, backend)
            parts = ((f.query, f.key, f.value), (f.out,), (f.gate, f.up), (f.down,))
            made.take(
                {n: tuple(_weight(model, f.layer(i, p)) for p in ps) for n, ps in zip(_NAMES, parts, strict=True)}
            )
            packed.append(made)
    except NotFused:
        for i in range(g.layers):
            for module in model.get_submodule(f.layer(i)).modules():
                if isinstance(module, QWeight):
                    module.take_back()
        raise
    for i, kernel in enumerate(packed):
        layer: Any = model.get_submodule(f.layer(i))
        layer.fused = kernel
        kind: Any = type(layer)
        layer.__class__ = fused_class(kind)  # as torch's FSDP does: the object, its hooks and children stay
    norm: Any = model.get_submodule(f.final_norm)
    norm.kernel = final
    embedding: Any = model.get_submodule(f.embedding)
    embedding.keeps_float32 = True


def _layer(
    graph: Graph, plan: Plan, index: int, producers: Mapping[str, Op], prefix: Any, backend: str
) -> LayerKernel:
    from .step_layer import StepLayer

    if backend == "onednn":
        return StepLayer(graph, plan, index, producers, prefix)
    block = layer_block(graph, plan, index, producers)
    return PackedLayer(block, index, plan.geometry.kv_heads, plan.geometry.head_dim, prefix)


def _final_norm(graph: Graph, op: Op) -> PackedNorm:
    from ..graph.operators import Static

    block = Block(_NORM_FIELDS)
    source, out = Static(graph, op.inputs[0]), Static(graph, op.output)
    block.put("", scales=torch.tensor([source.scale, out.scale], dtype=torch.float32), in_zero=source.zero)
    block.put("", in_qmax=source.grid.qmax, unused=0, **norm_numbers(graph, op))
    return PackedNorm(block.build())


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`, but for the codes."""
    for module in model.modules():
        kind = getattr(type(module), "fused_from", None)
        if kind is not None:
            module.__class__ = kind
            del module.fused


def _weight(model: nn.Module, path: str) -> QWeight:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, QWeight)
    return weight
