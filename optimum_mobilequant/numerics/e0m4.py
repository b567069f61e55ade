"""E0M4 (also called M0E4): 4-bit floats without exponent, which two bitwise operations decode.

The nibble m is the top of a float16 mantissa whose exponent is fixed: the bits ``0x3C00 | m << 6`` are the float16
number ``v = 1 + m / 16``. A group of a row's columns has one scale S and one offset B, ``w_hat = S * v + B``, with
``S = 16 * step`` and ``B = low - S``: round to nearest on the exact range of the group, only decoded without a
conversion from integer to float (Transformer-Lite, Li et al. 2024). The accuracy is that of asymmetric 4-bit groups.

Layout of the bytes: column 2j in the low nibble of byte j, column 2j + 1 in the high one. Decoding a byte b from
``b << 2``::

    odd column    v  = float16(0x3C00 | (b << 2) & 0x03C0)      = 1 + high / 16
    even column   v' = float16(0x3C00 | (b << 2) & 0x003C)      = 1 + low / 256,   w_hat = 16 S * v' + (B - 15 S)

so the shift of the low nibble is folded into its scale and offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import group_codes, pack_nibbles, unpack_nibbles

ONE = 0x3C00  # float16 bits of 1.0
SHIFT = 6  # from a nibble to the top of the ten bits of the mantissa


def e0m4_encode(weight: Tensor, group: int, *, search: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a matrix.

    Args:
        weight: float32 ``[out, in]``. group: columns that share a scale. search: see :func:`~.affine.group_codes`.

    Returns:
        bytes uint8 ``[out, ceil(in / 2)]``, scale S and offset B float32 ``[out, ceil(in / group)]``.
    """
    codes, step, low = group_codes(weight, 4, group, search=search)
    return pack_nibbles(codes), 16 * step, low - 16 * step


def e0m4_floats(nibbles: Tensor) -> Tensor:
    """float16 ``1 + m / 16`` of nibbles m (uint8, any shape), by bits."""
    return (nibbles.to(torch.int16) << SHIFT | ONE).view(torch.float16)


def e0m4_decode(packed: Tensor, scale: Tensor, offset: Tensor, group: int, columns: int) -> Tensor:
    """float32 ``[..., columns]``, the reference for kernels. Leading dimensions of all three may be any, but equal."""
    spread = [t.repeat_interleave(group, dim=-1)[..., :columns] for t in (scale, offset)]
    return e0m4_floats(unpack_nibbles(packed, columns)).float() * spread[0] + spread[1]
