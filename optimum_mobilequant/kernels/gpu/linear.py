"""Launches of the integer kernels: shapes, the choice of a configuration, the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Output, Packed
from . import autotune, layout
from .configs import EXACT, Config, cut
from .device import architecture_of, current, processors_of
from .epilogue import CODES, ON_GRID, REAL, TOTALS
from .product import decode_kernel, finish_wide_kernel, prefill_kernel, row_sums_kernel
from .workspace import fits, workspace_of

_BAND = 8  # tiles of rows whose activations stay in the cache together
_COLUMNS = 1024  # of a step of row_sums_kernel


def linear(x: Tensor, packed: Packed, output: Output, weight_bits: int, *, config: Config | None = None) -> Tensor:
    """Outputs ``[rows, out]`` of codes uint8 ``[..., in]``.

    Args:
        config: None: what :func:`~.autotune.best` says.

    Raises:
        ValueError: tensors that were packed for another layer.
    """
    x = x.reshape(-1, x.shape[-1]).contiguous()
    check(packed.weight, packed.multiplier, output, x.shape[1], packed.bias.shape[0], weight_bits)
    return _linear(x, packed, output, weight_bits, config)


def _linear(x: Tensor, packed: Packed, output: Output, weight_bits: int, config: Config | None) -> Tensor:
    out_features = packed.bias.shape[0]
    out = torch.empty((x.shape[0], out_features), dtype=output.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    if config is None:
        kind = kind_of_weight(packed.weight, x.shape[1], weight_bits)
        config = autotune.best(kind, out_features, x.shape[1], x.shape[0], x.device)
    with current(x.device):
        _launch(x, packed, output, weight_bits, config, out)
    return out


def wide_linear(x: Tensor, packed: Packed, output: Output, weight_bits: int) -> Tensor:
    """Outputs ``[rows, out]`` of 16-bit codes int32 ``[..., in]``: both of their bytes as rows of one product."""
    x = x.reshape(-1, x.shape[-1])
    rows, out_features = x.shape[0], packed.bias.shape[0]
    check(packed.weight, packed.multiplier, output, x.shape[1], out_features, weight_bits)
    out = torch.empty((rows, out_features), dtype=output.dtype, device=x.device)
    if rows == 0:
        return out
    planes = torch.cat([x >> 8, x & 0xFF]).to(torch.uint8)
    plain = Packed(packed.weight, torch.zeros_like(packed.bias, dtype=torch.int32), packed.multiplier, None, 0)
    parts = _linear(planes, plain, Output.totals(), weight_bits, None)
    zeros = packed.weight_zero_point
    sums = packed.bias if zeros is None else x.sum(-1, dtype=torch.int64)
    with current(x.device):
        finish_wide_kernel[(rows, -(-out_features // 256))](
            parts, packed.bias, packed.multiplier, packed.bias if zeros is None else zeros, sums, out,
            rows, out_features, output.zero_point, output.qmax, output.scale,
            ZEROS=zeros is not None, KIND=kind_of(output), COLUMNS=256, **EXACT,
        )  # fmt: skip
    return out


def check(
    weight: Tensor, multiplier: Tensor, output: Output, in_features: int, out_features: int, weight_bits: int
) -> None:
    """Refuse tensors whose shapes a kernel would read past."""
    size = _block(weight, weight_bits)
    shape = (layout.padded(in_features, size) // size, layout.padded(out_features, layout.ROWS))
    if weight.shape[0] < shape[0] or weight.shape[1] != shape[1]:
        raise ValueError("the weight was packed for another layer")
    if multiplier.numel() != out_features * (2 if output.qmax else 1):
        raise ValueError("the multipliers were packed for another layer or another output")


def kind_of_weight(weight: Tensor, in_features: int, weight_bits: int) -> str:
    """Kind of product in the table of configurations."""
    blocks = layout.padded(in_features, _block(weight, weight_bits)) // _block(weight, weight_bits)
    return f"w{weight_bits}a8" + ("-groups" if len(weight) > blocks else "")


def _block(weight: Tensor, weight_bits: int) -> int:
    return weight.shape[2] * (1 if weight_bits == 8 else 2)


def kind_of(output: Output) -> int:
    """The kernels' constant for an output."""
    if output.is_totals:
        return TOTALS
    if not output.qmax:
        return REAL
    return ON_GRID if output.dtype.is_floating_point else CODES


def _launch(x: Tensor, packed: Packed, output: Output, weight_bits: int, config: Config, out: Tensor) -> None:
    (rows, in_features), out_features = x.shape, packed.bias.shape[0]
    weight, zeros = packed.weight, packed.weight_zero_point
    block = _block(weight, weight_bits)
    blocks = layout.padded(in_features, block) // block
    tiles = -(-out_features // config.block_n) * -(-rows // config.block_m)
    sums = packed.bias if zeros is None else row_sums(x)
    # A warp group reads activations from shared memory, as they came: their top bits are flipped before.
    shifted = config.parts == 0 and architecture_of(x.device) == "sm90"
    codes = ((x ^ 128) if shifted else x).view(torch.int8)
    tensors = (
        codes, weight, weight[blocks:].view(torch.uint8) if len(weight) > blocks else weight, packed.bias,
        packed.multiplier, packed.bias if zeros is None else zeros, sums, out,
    )  # fmt: skip
    shape = (rows, out_features, in_features, weight.shape[1], blocks)
    grid = (output.zero_point, output.qmax, output.scale)
    constants = {
        "BITS": weight_bits, "BLOCK": block, "GROUPED": len(weight) > blocks, "ZEROS": zeros is not None,
        "KIND": kind_of(output), "SHIFTED": shifted, "WHOLE": in_features % block == 0,
        "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
    }  # fmt: skip
    options = config.options(block)
    if config.parts == 0:
        programs = min(tiles, processors_of(x.device) * (2 if config.block_n * config.block_m <= 4096 else 1))
        prefill_kernel[(programs,)](*tensors, *shape, *grid, **constants, BAND=_BAND, **options)
        return
    pieces = cut(config, tiles, blocks, processors_of(x.device))
    if pieces.parts > 1 and not fits(tiles, pieces.parts, config.block_n, config.block_m):
        pieces = cut(config, tiles, blocks, 0)
    room = workspace_of(x.device)
    decode_kernel[(tiles, pieces.parts)](
        *tensors, room.partial, room.counters, *shape, pieces.blocks, *grid, **constants, SPLIT=pieces.parts > 1,
        **options,
    )  # fmt: skip


def row_sums(x: Tensor) -> Tensor:
    """int32 ``[rows]``: sums of uint8 codes ``[rows, in]``, for weights with zero points."""
    sums = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    row_sums_kernel[(x.shape[0],)](x, sums, x.shape[1], COLUMNS=_COLUMNS, **EXACT)
    return sums
