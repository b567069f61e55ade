"""Weights in the layout of the GPU kernels, made once when a layer is packed. Plain torch, on any device.

A weight ``[out, in]`` is cut along ``in`` into blocks of :data:`BLOCK` columns, and each block lies in one piece,
``[blocks, out, bytes]``: a tile of any number of rows is one contiguous read. A byte of a 4-bit block holds column
``j`` in its low half and column ``j + BLOCK / 2`` in its high half, so that a tile of bytes becomes two tiles of
weights, each with its columns in order, by one mask and one shift, and no element changes its thread. (Repacking
offline for the matrix instruction: Marlin, Frantar et al., PPoPP 2025.)

Rows are padded to :data:`ROWS` and columns to whole blocks with zeros, which add nothing to a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
ROWS = 128
GROUPS = (32, 64, 128)  # columns that may share a scale or multiplier of their own


def block_of(group: int) -> int:
    """Columns of a block: half of it is a group. ``group`` 0: one scale for each row."""
    return 2 * group or BLOCK


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up."""
    return -(-size // multiple) * multiple


def pack_bytes(codes: Tensor) -> Tensor:
    """8-bit codes: int8 ``[out, in]`` -> int8 ``[blocks, out (padded), BLOCK]``."""
    return _blocks(codes, BLOCK).contiguous()


def unpack_bytes(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The codes that :func:`pack_bytes` packed, int8 ``[out, in]``."""
    return packed.permute(1, 0, 2).flatten(1)[:out_features, :in_features].contiguous()


def pack_nibbles(codes: Tensor, *, group: int = 0) -> Tensor:
    """4-bit codes: int8 ``[out, in]`` in [-8, 7] -> int8 ``[blocks, out (padded), block / 2]``, two's complement."""
    return _pair(_blocks(codes, block_of(group)))


def pack_unsigned_nibbles(codes: Tensor, *, group: int = 0) -> Tensor:
    """As :func:`pack_nibbles`, with ``code + 8`` in each half: what decodes to a float by one mask and one or."""
    return _pair(_blocks(codes, block_of(group)) + 8)


def unpack_nibbles(packed: Tensor, out_features: int, in_features: int, *, unsigned: bool = False) -> Tensor:
    """The codes that :func:`pack_nibbles` or :func:`pack_unsigned_nibbles` packed, int8 ``[out, in]``."""
    low, high = (packed << 4) >> 4, packed >> 4  # arithmetic shifts: the sign comes along
    codes = torch.cat([low, high], dim=-1)
    if unsigned:
        codes = (codes & 15) - 8
    return unpack_bytes(codes, out_features, in_features)


def pack_groups(values: Tensor, in_features: int, group: int) -> Tensor:
    """``[out, groups]`` -> ``[groups (of whole blocks), out (padded)]``, so that a tile's rows are contiguous."""
    rows, groups = values.shape
    more = padded(in_features, block_of(group)) // group - groups
    return F.pad(values.t(), (0, padded(rows, ROWS) - rows, 0, more)).contiguous()


def pack_grouped(nibbles: Tensor, multiplier: Tensor, group: int) -> Tensor:
    """:func:`pack_nibbles`, and behind its blocks, in as many more as they fill, the multipliers of the groups.

    Args:
        multiplier: uint8 ``[out, groups]``.
    """
    packed = pack_nibbles(nibbles, group=group)
    factors = pack_groups(multiplier, nibbles.shape[1], group).view(torch.int8)
    more = padded(len(factors), packed.shape[2])
    factors = F.pad(factors, (0, 0, 0, more - len(factors))).view(-1, *packed.shape[1:])
    return torch.cat([packed, factors])


def unpack_grouped(packed: Tensor, rows: Tensor | slice, in_features: int, group: int) -> tuple[Tensor, Tensor]:
    """Nibbles, int8 ``[rows, in]``, and multipliers, uint8 ``[rows, groups]``, that :func:`pack_grouped` packed."""
    blocks = padded(in_features, block_of(group)) // block_of(group)
    factors = packed[blocks:].view(torch.uint8).view(-1, packed.shape[1])[: -(-in_features // group), rows]
    return unpack_nibbles(packed[:blocks, rows], factors.shape[1], in_features), factors.t().contiguous()


def _blocks(codes: Tensor, block: int) -> Tensor:
    """int8 ``[blocks, out (padded), block]``, a view of a padded copy."""
    rows, columns = codes.shape
    wide = F.pad(codes, (0, padded(columns, block) - columns, 0, padded(rows, ROWS) - rows))
    return wide.view(wide.shape[0], -1, block).permute(1, 0, 2)


def _pair(blocks: Tensor) -> Tensor:
    low, high = blocks.chunk(2, dim=-1)
    return ((high << 4) | (low & 15)).contiguous()
