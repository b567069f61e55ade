"""Two 4-bit codes in a byte, in the row order optimum-quanto stores them."""

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
