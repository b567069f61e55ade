"""Products of 4-bit weights and 16-bit floating-point activations, ``out^T = W x^T``, sums in float32.

Scales are applied to sums, one for a channel or for a channel's group of columns, and never to single weights, which
are exact in 16 bits. An offset (a zero point, or what ``e0m4`` needs) is one more product with the sums of the
activations over the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nibbles import INTERPRETED, decode


@triton.jit
def load_reals(x, rows, columns, in_features, WHOLE: tl.constexpr):
    """A tile of activations, transposed: ``[columns, rows]``."""
    where = x + rows[None, :].to(tl.int64) * in_features + columns[:, None]
    return tl.load(where) if WHOLE else tl.load(where, mask=columns[:, None] < in_features, other=0.0)


@triton.jit
def multiply(a, b, total):
    """``a @ b + total`` in float32. The interpreter would multiply the bits of bfloat16, so it gets float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def accumulate_real(
    x, weight, scale, offset, sums, rows, channels, first, last, in_rows, in_features, stride,
    BLOCK: tl.constexpr, GROUPED: tl.constexpr, OFFSET: tl.constexpr, E0M4: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """float32 sums ``[BLOCK_N, BLOCK_M]`` over the blocks ``first`` to ``last``; with GROUPED scaled, else not yet."""
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    HALF: tl.constexpr = BLOCK // 2
    inside = tl.arange(0, HALF)
    step = stride.to(tl.int64) * HALF
    for block in range(first, last):
        tile = tl.load(
            weight + block * step + channels[:, None] * HALF + inside[None, :], eviction_policy=EVICT
        )  # fmt: skip
        low, high = decode(tile, E0M4, x.dtype.element_ty)
        columns = block * BLOCK + inside
        x_low = load_reals(x, rows, columns, in_features, WHOLE)
        x_high = load_reals(x, rows, columns + HALF, in_features, WHOLE)
        if GROUPED:
            group = block * 2 * stride + channels
            none = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            total += multiply(low, x_low, none) * tl.load(scale + group)[:, None]
            total += multiply(high, x_high, none) * tl.load(scale + group + stride)[:, None]
            if OFFSET:
                row_sums = sums + block * 2 * in_rows + rows
                total += tl.load(offset + group)[:, None] * tl.load(row_sums)[None, :]
                total += tl.load(offset + group + stride)[:, None] * tl.load(row_sums + in_rows)[None, :]
        else:
            total = multiply(low, x_low, total)
            total = multiply(high, x_high, total)
    return total


@triton.jit
def store_real(
    total, out, scale, offset, sums, bias, rows, channels, in_rows, out_features,
    GROUPED: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scale (unless GROUPED), bias, and the store to ``[rows, channels]``."""
    inside = channels < out_features
    if not GROUPED:
        total = total * tl.load(scale + channels)[:, None]
        if OFFSET:
            row_sums = tl.load(sums + rows, mask=rows < in_rows, other=0.0)
            total += tl.load(offset + channels)[:, None] * row_sums[None, :]
    if BIAS:
        total += tl.load(bias + channels, mask=inside, other=0.0)[:, None]
    where = out + rows[:, None].to(tl.int64) * out_features + channels[None, :]
    mask = (rows[:, None] < in_rows) & inside[None, :]
    tl.store(where, tl.trans(total).to(out.dtype.element_ty), mask=mask)


@triton.jit
def real_decode_kernel(
    x, weight, scale, offset, sums, bias, out, partial, counters,
    in_rows, out_features, in_features, stride, blocks, blocks_per_part,
    BLOCK: tl.constexpr, GROUPED: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, E0M4: tl.constexpr,
    WHOLE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Few rows; as :func:`~.product.decode_kernel`. The parts are added in their order, so sums do not scatter."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    channels = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = part * blocks_per_part
    total = accumulate_real(
        x, weight, scale, offset, sums, tl.minimum(rows, in_rows - 1), channels, first,
        tl.minimum(first + blocks_per_part, blocks), in_rows, in_features, stride, BLOCK, GROUPED, OFFSET, E0M4, WHOLE,
        BLOCK_N, BLOCK_M, "evict_first",
    )  # fmt: skip
    if SPLIT:
        parts = tl.num_programs(1)
        slots = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        own = partial + (tile * parts).to(tl.int64) * (BLOCK_N * BLOCK_M) + slots
        used = (rows < in_rows)[None, :]
        tl.store(own + part * (BLOCK_N * BLOCK_M), total, mask=used)
        tl.debug_barrier()  # every thread's part is written before the program is counted
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(0, parts):
                total += tl.load(own + other * (BLOCK_N * BLOCK_M), mask=used, other=0.0, cache_modifier=".cg")
            tl.atomic_xchg(counters + tile, 0)
            store_real(
                total, out, scale, offset, sums, bias, rows, channels, in_rows, out_features, GROUPED, OFFSET, BIAS
            )
    else:
        store_real(
            total, out, scale, offset, sums, bias, rows, channels, in_rows, out_features, GROUPED, OFFSET, BIAS
        )  # fmt: skip


@triton.jit
def real_prefill_kernel(
    x, weight, scale, offset, sums, bias, out, in_rows, out_features, in_features, stride, blocks,
    BLOCK: tl.constexpr, GROUPED: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, E0M4: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Many rows; as :func:`~.product.prefill_kernel`."""
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    tiles_m = tl.cdiv(in_rows, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0)):
        band = tile // (BAND * tiles_n)
        width = tl.minimum(tiles_m - band * BAND, BAND)
        within = tile % (BAND * tiles_n)
        rows = (band * BAND + within % width) * BLOCK_M + tl.arange(0, BLOCK_M)
        channels = (within // width) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = accumulate_real(
            x, weight, scale, offset, sums, tl.minimum(rows, in_rows - 1), channels, 0, blocks, in_rows, in_features,
            stride, BLOCK, GROUPED, OFFSET, E0M4, WHOLE, BLOCK_N, BLOCK_M, "",
        )  # fmt: skip
        store_real(
            total, out, scale, offset, sums, bias, rows, channels, in_rows, out_features, GROUPED, OFFSET, BIAS
        )  # fmt: skip


@triton.jit
def group_sums_kernel(x, sums, in_rows, in_features, group, COLUMNS: tl.constexpr):
    """float32 ``[groups, rows]``: sums of the activations over each group of columns; programs (rows, groups)."""
    row = tl.program_id(0)
    start = tl.program_id(1) * group
    end = tl.minimum(start + group, in_features)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for column in range(start, end, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        total += tl.load(x + row.to(tl.int64) * in_features + columns, mask=columns < end, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(1) * in_rows + row, tl.sum(total, axis=0))
