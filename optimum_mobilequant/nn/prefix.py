"""A prefix: keys and values of a few fixed tokens that every text finds in its cache before its own first token.

Large models turn the first token, and now and then a delimiter, into a vector hundreds of times larger than any other
and park attention on it. Where those tokens stand in the cache from the start (PrefixQuant, Chen et al. 2024;
CushionCache, Son et al. 2024) the text has none of them, and static ranges need not hold them.

The prefix belongs to the attention, not to the cache: it is put in front of whatever keys and values the cache
returns. So every cache class, ``generate``, beam search and padding see the text alone, and :func:`shift_positions`
counts the text's positions from behind the prefix. On a device it is the initial content of the cache's first slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families import cache_name
from ..numerics import dequantize, quantize
from .quantizer import Quantizer
from .tunable import TunableWeight


class Prefix(nn.Module, ABC):
    """Keys and values of the prefix in one attention layer. ``value_quantizer`` is a path from the attention."""

    length: int

    def __init__(self, value_path: str):
        super().__init__()
        self.value_quantizer = f"{value_path}.output"

    def quantizers(self, attention: nn.Module) -> tuple[Quantizer, Quantizer]:
        """The quantizers whose grids the keys and the values are on."""
        return attention.get_submodule("key_rotated"), attention.get_submodule(self.value_quantizer)  # type: ignore[return-value]

    @abstractmethod
    def read(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """Rounded keys and values, float ``[1, kv_heads, length, head_dim]`` each."""

    def before(
        self, attention: nn.Module, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values ``[batch, kv_heads, k, head_dim]`` and additive mask ``[batch, 1, q, k]`` with the prefix in
        front, where every position sees it."""
        own = (t.to(key.dtype).expand(len(key), -1, -1, -1) for t in self.read(attention))
        key, value = (torch.cat(pair, dim=2) for pair in zip(own, (key, value), strict=True))
        return key, value, None if attention_mask is None else F.pad(attention_mask, (self.length, 0))


class PackedPrefix(Prefix):
    """Buffers: ``key`` and ``value``, codes ``[kv_heads, length, head_dim]`` on the grids of the cache."""

    key: Tensor
    value: Tensor

    def __init__(self, key: Tensor, value: Tensor, value_path: str):
        super().__init__(value_path)
        self.register_buffer("key", key)
        self.register_buffer("value", value)
        self.length = key.shape[1]

    def read(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        parts = zip((self.key, self.value), self.quantizers(attention), strict=True)
        key, value = (dequantize(codes[None], q.scale, q.zero_point) for codes, q in parts)
        return key, value


class TunablePrefix(Prefix):
    """The prefix of a student: the float model's keys and values, carried through the transforms at each use.

    Args:
        key, value: float32 ``[kv_heads, length, head_dim]``, keys rotated and not shifted; shared, never written.
        value_path: path of the value projection from the attention.
        key_path: of what a transform of the keys changes: their norm, or the key projection.
    """

    sources: tuple[Tensor, Tensor]

    def __init__(self, key: Tensor, value: Tensor, value_path: str, key_path: str):
        super().__init__(value_path)
        object.__setattr__(self, "sources", (key, value))
        self.paths = (key_path, value_path)
        self.length = key.shape[1]

    def floats(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values before rounding, ``[1, kv_heads, length, head_dim]`` each."""
        key, value = (
            carried(attention.get_submodule(path).weight, x)  # type: ignore[arg-type]
            for path, x in zip(self.paths, self.sources, strict=True)
        )
        shift: Any = getattr(attention, "key_shift", None)
        return (key if shift is None else key + shift.value(attention))[None], value[None]

    def turn(self, path: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change the channels of what the projection at ``path`` makes, ``[kv_heads * head_dim, ...]``, if it is one
        of the two."""

        def changed(x: Tensor) -> Tensor:
            heads, length, size = x.shape
            flat = change(x.transpose(1, 2).reshape(heads * size, length))
            return flat.view(heads, size, length).transpose(1, 2).contiguous()

        pairs = zip(self.paths, self.sources, strict=True)
        object.__setattr__(self, "sources", tuple(changed(x) if own == path else x for own, x in pairs))

    def read(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        of_keys, of_values = self.quantizers(attention)
        key, value = self.floats(attention)
        # Not called as modules: hooks on them are to see the text's keys and values alone.
        return of_keys.forward(key), of_values.forward(value)

    @torch.no_grad()
    def codes(self, attention: nn.Module) -> tuple[Tensor, Tensor, float]:
        """Codes as in :class:`PackedPrefix`, and the share of them that lies beyond the grid's ends."""
        codes, clipped, count = [], 0, 0
        for x, q in zip(self.floats(attention), self.quantizers(attention), strict=True):
            codes.append(quantize(x[0], q.scale, q.zero_point, q.spec.grid))
            steps = torch.div(x, q.scale).round() + q.zero_point
            clipped += int(((steps < q.spec.grid.qmin) | (steps > q.spec.grid.qmax)).sum())
            count += x.numel()
        return codes[0], codes[1], clipped / count


def carried(weight: TunableWeight, x: Tensor) -> Tensor:
    """``x`` ``[kv_heads, length, head_dim]`` as the transformed weight would have made it."""
    heads, length, size = x.shape
    if len(weight.shape) == 1:  # the gain of a norm over the head, the same for all heads
        return weight.carry_rows(x.permute(2, 0, 1).reshape(size, -1)).view(size, heads, length).permute(1, 2, 0)
    rows = weight.carry_rows(x.transpose(1, 2).reshape(heads * size, length))
    return rows.view(heads, size, length).transpose(1, 2)


def prepend(ids: Tensor, prefix: Sequence[int]) -> Tensor:
    """``ids`` ``[batch, length]`` with the prefix tokens in front of each text."""
    if not prefix:
        return ids
    return torch.cat([ids.new_tensor(prefix).expand(len(ids), -1), ids], dim=1)


def logits_behind(model: nn.Module, prefix: Sequence[int], ids: Tensor) -> Tensor:
    """Logits of the texts ``ids`` ``[batch, length]`` from a float model that has read the prefix tokens first."""
    logits: Tensor = model(input_ids=prepend(ids, prefix), use_cache=False).logits
    return logits[:, len(prefix) :]


@torch.no_grad()
def prefix_states(model: nn.Module, prefix: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys (rotated) and values that a float model computes for the prefix tokens, layer by layer, float32
    ``[kv_heads, length, head_dim]``."""
    ids = torch.tensor([list(prefix)], device=next(model.parameters()).device)
    layers = getattr(model(input_ids=ids, use_cache=True), cache_name(model)).layers
    return [(layer.keys[0].float().contiguous(), layer.values[0].float().contiguous()) for layer in layers]


def shift_positions(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the rotary module ``(x, position_ids)``: the text begins behind the prefix."""
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": kwargs["position_ids"] + rotary.prefix_length}
    x, position_ids, *rest = args
    return (x, position_ids + rotary.prefix_length, *rest), kwargs


def hang_prefix(model: nn.Module, rotary: str, prefixes: dict[str, Prefix]) -> None:
    """Give each attention (by path) its prefix and let positions start behind it."""
    for path, prefix in prefixes.items():
        attention: Any = model.get_submodule(path)
        attention.prefix = prefix
    module: Any = model.get_submodule(rotary)
    module.prefix_length = next(iter(prefixes.values())).length
    module.register_forward_pre_hook(shift_positions, with_kwargs=True)


def remove_prefix(model: nn.Module) -> int:
    """Undo :func:`hang_prefix`; returns how many tokens the prefix had."""
    length = 0
    for module in model.modules():
        if isinstance(getattr(module, "prefix", None), Prefix):
            length = module.prefix.length  # type: ignore[union-attr, assignment]
            del module.prefix
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is shift_positions:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key], module.prefix_length
    return length


def prefix_length(model: nn.Module) -> int:
    """Number of tokens in the prefix of a quantized model, 0 if it has none."""
    return next((m.length for m in model.modules() if isinstance(m, Prefix)), 0)


def prefix_codes(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Codes of the prefix of a quantized model, layer by layer: uint8 ``[kv_heads, length, head_dim]`` keys and
    values, the initial content of a static cache; an empty list if it has none."""
    return [(m.key, m.value) for m in model.modules() if isinstance(m, PackedPrefix)]
