"""The KV cache of the fused layers: one byte for each number, written in place, in the layout the kernels read.

It stands in a transformers ``Cache`` in the place of the layer that was there: ``generate`` and its beam search,
cropping and padding work as they do with their own layers, on whatever cache they have made.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

PANEL = 64  # positions, and dimensions of a value, in a panel (linear.h)


class IntegerCacheLayer(CacheLayerMixin):
    """Codes of the keys and values of one layer, less 128.

    Tensors: ``keys`` int8 ``[batch, kv_heads, capacity / 64, ceil(dims / 4), 64, 4]``, ``key_sums`` int32
    ``[batch, kv_heads, capacity]``, ``values`` int8 ``[batch, kv_heads, ceil(dims / 64), capacity / 4, 64, 4]``; the
    capacity doubles when it is reached.

    Args:
        kv_heads, dims: of the layer. capacity: positions to have room for at once.

    A prefix of the model takes the first slots; what transformers is told counts the text alone.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, kv_heads: int, dims: int, capacity: int = PANEL):
        super().__init__()
        self.kv_heads, self.dims = kv_heads, dims
        self.wanted = capacity
        self.length = 0  # slots in use
        self.front = 0  # of them, slots of the prefix
        self.key_sums: Tensor | None = None

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2] * PANEL

    def reserve(self, batch: int, new: int, device: torch.device) -> None:
        """Room for ``new`` more positions.

        Raises:
            ValueError: another batch size than the cached one.
        """
        if self.keys is not None and self.length == 0 and self.keys.shape[0] != batch:
            self.reset()
        needed = self.length + new
        if self.keys is not None:
            if self.keys.shape[0] != batch:
                raise ValueError(f"the cache holds {self.keys.shape[0]} sequences, and {batch} are given")
            if needed <= self.capacity:
                return
        self._grow(batch, -(-max(needed, self.wanted, 2 * self.capacity) // PANEL) * PANEL, device)
        self.is_initialized = True

    def _grow(self, batch: int, capacity: int, device: torch.device) -> None:
        old, shape = self.capacity, (batch, self.kv_heads)
        groups, panels = -(-self.dims // 4), -(-self.dims // PANEL)
        keys = torch.zeros((*shape, capacity // PANEL, groups, PANEL, 4), dtype=torch.int8, device=device)
        values = torch.zeros((*shape, panels, capacity // 4, PANEL, 4), dtype=torch.int8, device=device)
        sums = torch.zeros((*shape, capacity), dtype=torch.int32, device=device)
        if self.keys is not None and self.values is not None and self.key_sums is not None:
            keys[:, :, : old // PANEL] = self.keys
            values[:, :, :, : old // 4] = self.values
            sums[:, :, :old] = self.key_sums
        self.keys, self.values, self.key_sums = keys, values, sums

    def begin(self, batch: int, prefix: tuple[Tensor, Tensor] | None, device: torch.device) -> None:
        """Fill an empty cache with the prefix, codes ``[kv_heads, length, dims]`` of keys and values."""
        if prefix is not None and self.length == 0:
            self.reserve(batch, 0, device)
            self.write(*(codes.to(device).expand(batch, -1, -1, -1) for codes in prefix))
            self.front = self.length

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes of the cached keys and values, uint8 ``[batch, kv_heads, length, dims]``."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty")
        keys = self.keys.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)[:, :, : self.length, : self.dims]
        values = self.values.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)[:, :, : self.length, : self.dims]
        return _unsigned(keys), _unsigned(values)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Append codes, uint8 ``[batch, kv_heads, new, dims]``: what the kernel does itself for new tokens."""
        batch, _, new, dims = keys.shape
        self.reserve(batch, new, keys.device)
        assert self.keys is not None and self.values is not None and self.key_sums is not None
        t, d = torch.arange(self.length, self.length + new)[:, None], torch.arange(dims)[None, :]
        signed = keys.to(torch.int16) - 128
        self.keys[:, :, t // PANEL, d // 4, t % PANEL, d % 4] = signed.to(torch.int8)
        self.key_sums[:, :, self.length : self.length + new] = signed.sum(-1, dtype=torch.int32)
        self.values[:, :, d // PANEL, t // 4, d % PANEL, t % 4] = (values.to(torch.int16) - 128).to(torch.int8)
        self.length += new

    # What transformers asks of a cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError(_FOREIGN)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(_FOREIGN)

    def get_seq_length(self) -> int:
        return self.length - self.front

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length - self.front + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, by the name that the oldest supported transformers asks for."""
        return self.get_max_length()

    def reset(self) -> None:
        self.keys = self.values = self.key_sums = None
        self.is_initialized, self.length, self.front = False, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many of the last tokens to remove")
        self.length = max(self.front, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.key_sums = None if self.key_sums is None else self.key_sums[indices]

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass


class PlainCacheLayer(IntegerCacheLayer):
    """The same codes without a kernel's layout, for layers of torch's operators.

    Tensors: ``keys`` and ``values``, int8 ``[batch, kv_heads, capacity, dims]``.
    """

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def _grow(self, batch: int, capacity: int, device: torch.device) -> None:
        shape, old = (batch, self.kv_heads, capacity, self.dims), (self.keys, self.values)
        self.keys, self.values = (torch.zeros(shape, dtype=torch.int8, device=device) for _ in range(2))
        for new, held in zip((self.keys, self.values), old, strict=True):
            if held is not None:
                new[:, :, : held.shape[2]] = held

    def codes(self) -> tuple[Tensor, Tensor]:
        keys, values = self.held()
        return _unsigned(keys), _unsigned(values)

    def held(self) -> tuple[Tensor, Tensor]:
        """Codes less 128 of the cached keys and values, int8 ``[batch, kv_heads, length, dims]``."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty")
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def write(self, keys: Tensor, values: Tensor) -> None:
        self.append(keys.to(torch.int16) - 128, values.to(torch.int16) - 128)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append codes less 128, ``[batch, kv_heads, new, dims]``, of any dtype."""
        self.reserve(keys.shape[0], keys.shape[2], keys.device)
        assert self.keys is not None and self.values is not None
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end


_FOREIGN = (
    "this cache was filled by fused integer layers and holds codes that another attention cannot read; start with a "
    "new cache after set_backend"
)


def _unsigned(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) + 128).to(torch.uint8)


Layer = TypeVar("Layer", bound=IntegerCacheLayer)


def integer_layer(cache: Any, index: int, kv_heads: int, dims: int, kind: type[Layer]) -> Layer:
    """The integer layer of a transformers cache, put in the place of an empty layer the first time.

    Args:
        index: of the layer. kv_heads, dims: of its keys. kind: of the cache layer.

    Raises:
        TypeError: no cache of transformers. ValueError: a cache of another kind, or one that holds floats.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a cache of transformers, not {type(cache).__name__}")
    layers: list[Any] = cache.layers
    if cache.offloading:
        raise ValueError("an offloaded cache moves floats between devices; the int8 cache of this model is not one")
    if cache.layer_class_to_replicate is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if isinstance(layer, IntegerCacheLayer):
        if type(layer) is kind:
            return layer
        raise ValueError("past_key_values was filled by another backend; start with a new cache after set_backend")
    if not isinstance(layer, (DynamicLayer, StaticLayer)) or type(layer).__name__.startswith("Quant"):
        raise ValueError(
            f"the fused integer layers keep their own int8 cache and cannot use {type(layer).__name__}: leave "
            'cache_implementation out, or call set_backend(model, "simulate")'
        )
    if int(layer.get_seq_length()):
        raise ValueError(
            "past_key_values was filled by another model or backend; the fused integer layers need an empty cache"
        )
    size = getattr(layer, "max_cache_len", 0)
    made = kind(kv_heads, dims, int(size) or PANEL)
    layers[index] = made
    return made
