"""Codes narrower than a byte.

4 bits: two codes in a byte, in the row order optimum-quanto stores them. 3 bits: one plane for each bit, so that
nothing is wasted and any row can be read alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack signed codes in [-8, 7] as unsigned nibbles (code + 8).

    Row r goes to the low nibble and row r + ceil(rows / 2) to the high one: the layout of optimum-quanto 0.2.7's
    ``PackedTensor``. An odd last row leaves the high nibble of its byte 0.

    Args:
        codes: integer ``[rows, columns]``.

    Returns:
        uint8 ``[ceil(rows / 2), columns]``.
    """
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
    half = (codes.shape[0] + 1) // 2
    packed = unsigned[:half].clone()
    packed[: codes.shape[0] - half] |= unsigned[half:] << 4
    return packed


def unpack_int4(packed: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pack_int4`: int8 ``[rows, columns]``."""
    unsigned = torch.cat([packed & 0x0F, packed >> 4])[:rows]
    return unsigned.to(torch.int8) - 8


def unpack_int4_rows(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """Rows ``index`` (int64, any shape) of the unpacked matrix, int8 ``[*index.shape, columns]``."""
    half = (rows + 1) // 2
    byte = packed[torch.where(index < half, index, index - half)]
    high = (index >= half).unsqueeze(-1)
    return torch.where(high, byte >> 4, byte & 0x0F).to(torch.int8) - 8


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes of ``bits`` bits as bit planes of code + 2^(bits-1).

    With ``g = ceil(rows / 8)``, plane p holds bit p of row r in bit ``r // g`` of its byte row ``r % g``; bits without
    a row are 0.

    Args:
        codes: integer ``[rows, columns]``.

    Returns:
        uint8 ``[bits, ceil(rows / 8), columns]``.
    """
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    height = -(-codes.shape[0] // 8)
    packed = unsigned.new_zeros(bits, height, codes.shape[1])
    for place, rows in enumerate(unsigned.split(height)):
        for plane in range(bits):
            packed[plane, : len(rows)] |= ((rows >> plane) & 1) << place
    return packed


def unpack_planes(packed: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pack_planes`: int8 ``[rows, columns]``."""
    bits = len(packed)
    parts = [sum(((plane >> place) & 1) << p for p, plane in enumerate(packed)) for place in range(8)]
    return torch.cat(parts)[:rows].to(torch.int8) - 2 ** (bits - 1)


def unpack_planes_rows(packed: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (int64, any shape) of the unpacked matrix, int8 ``[*index.shape, columns]``."""
    bits, height, _ = packed.shape
    place, row = (index // height).to(torch.uint8).unsqueeze(-1), index % height
    unsigned = sum(((packed[plane][row] >> place) & 1) << plane for plane in range(bits))
    assert isinstance(unsigned, Tensor)
    return unsigned.to(torch.int8) - 2 ** (bits - 1)
