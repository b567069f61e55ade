"""Launches of the kernels for 4-bit weights and floating-point activations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autotune, layout
from .configs import EXACT, Config, cut
from .device import current, processors_of
from .real_product import group_sums_kernel, real_decode_kernel, real_prefill_kernel
from .workspace import fits, workspace_of

_BAND = 8  # tiles of rows whose activations stay in the cache together


def real_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    e0m4: bool,
    *,
    config: Config | None = None,
) -> Tensor:
    """Outputs ``[rows, out]`` of bfloat16 or float16 ``[..., in]``, in that dtype.

    Args:
        weight: as :func:`~.layout.pack_unsigned_nibbles` packs it. scale, offset: float32 ``[groups, out (padded)]``,
            one group for a scale of each channel. bias: float32 ``[out]``.
        config: None: what :func:`~.autotune.best` says.

    Raises:
        ValueError: tensors that were packed for another layer.
    """
    x = x.reshape(-1, x.shape[-1]).contiguous()
    rows, in_features = x.shape
    block = 2 * weight.shape[2]
    shape = (layout.padded(in_features, block) // block, layout.padded(out_features, layout.ROWS))
    groups = len(scale)
    if tuple(weight.shape[:2]) != shape or scale.shape[1] != shape[1] or groups not in (1, 2 * shape[0]):
        raise ValueError("the weight was packed for another layer")
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if config is None:
        config = autotune.best("w4-groups" if groups > 1 else "w4", out_features, in_features, rows, x.device)
    with current(x.device):
        sums = scale if offset is None else _group_sums(x, groups, block // 2 if groups > 1 else in_features)
        tensors = (x, weight, scale, scale if offset is None else offset, sums, scale if bias is None else bias, out)
        sizes = (rows, out_features, in_features, shape[1], shape[0])
        constants = {
            "BLOCK": block, "GROUPED": groups > 1, "OFFSET": offset is not None, "BIAS": bias is not None,
            "E0M4": e0m4, "WHOLE": in_features % block == 0, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
            **config.options(block),
        }  # fmt: skip
        tiles = -(-out_features // config.block_n) * -(-rows // config.block_m)
        if config.parts == 0:
            programs = min(tiles, processors_of(x.device) * (2 if config.block_n * config.block_m <= 4096 else 1))
            real_prefill_kernel[(programs,)](*tensors, *sizes, **constants, BAND=_BAND)
            return out
        pieces = cut(config, tiles, shape[0], processors_of(x.device))
        if pieces.parts > 1 and not fits(tiles, pieces.parts, config.block_n, config.block_m):
            pieces = cut(config, tiles, shape[0], 0)
        room = workspace_of(x.device)
        real_decode_kernel[(tiles, pieces.parts)](
            *tensors, room.partial.view(torch.float32), room.counters, *sizes, pieces.blocks, **constants,
            SPLIT=pieces.parts > 1,
        )  # fmt: skip
    return out


def _group_sums(x: Tensor, groups: int, group: int) -> Tensor:
    sums = torch.empty((groups, x.shape[0]), dtype=torch.float32, device=x.device)
    group_sums_kernel[(x.shape[0], groups)](x, sums, x.shape[0], x.shape[1], group, COLUMNS=128, **EXACT)
    return sums
