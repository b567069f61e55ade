"""Integer products on tensor cores: ``out^T = W x^T`` for 8- and 4-bit weights and 8-bit activations.

The weight is the left operand. Hopper's warp-group instruction takes only that one from registers, where the 4-bit
weights are unpacked; and the few rows of a decode step become the instruction's narrow side, 8 wide instead of 64.

A 4-bit weight is used as the high half of a byte, 16 times its value, sign included: one mask or one shift for a
weight. The 16 is divided out of the sum, exactly. Unsigned activation codes become signed ones by their top bit; the
128 that this subtracts lies in the bias (:meth:`~..spec.Weights.folded_bias`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import to_output

# Four bytes in one instruction. Written out, because the compiler would take the bytes one by one.
_SPLIT = "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0;"
SPLIT_NIBBLES = tl.constexpr(_SPLIT)
FLIP_TOP_BITS = tl.constexpr("xor.b32 $0, $1, 0x80808080;")
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# No kernel is specialised on a zero point: every layer has another one, and would be compiled anew where it is 16 n.


@triton.jit
def split_nibbles(tile):
    """Both halves of int8 bytes as int8: 16 times the low and 16 times the high 4-bit number."""
    if INTERPRETED:
        low, high = tile << 4, tile & -16
    else:
        low, high = tl.inline_asm_elementwise(
            SPLIT_NIBBLES, "=&r,=r,r", [tile], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def to_signed(codes):
    """Unsigned codes (int8 holding their bits) less 128, as int8."""
    if INTERPRETED:
        signed = codes ^ -128
    else:
        signed = tl.inline_asm_elementwise(FLIP_TOP_BITS, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    return signed


@triton.jit
def load_rows(x, rows, columns, in_features, SHIFTED: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of activations, transposed: int8 ``[columns, rows]``; SHIFTED: they are signed already."""
    where = x + rows[None, :].to(tl.int64) * in_features + columns[:, None]
    codes = tl.load(where) if WHOLE else tl.load(where, mask=columns[:, None] < in_features, other=0)
    return codes if SHIFTED else to_signed(codes)


@triton.jit
def accumulate(
    x, weight, groups, rows, channels, first, last, in_features, stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, SHIFTED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Sums over the blocks ``first`` to ``last`` of the columns, int32 ``[BLOCK_N, BLOCK_M]``.

    Args:
        groups: uint8 ``[groups, stride]``, with GROUPED: a multiplier for each half of a block, whose sums are taken
            into the total with it. Without, the sums of 4-bit weights are 16 times too large.
        stride: rows of the packed weight (padded).
    """
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    HALF: tl.constexpr = BLOCK // 2
    BYTES: tl.constexpr = BLOCK if BITS == 8 else BLOCK // 2
    inside = tl.arange(0, BYTES)
    step = stride.to(tl.int64) * BYTES
    for block in range(first, last):
        start = weight + block * step
        tile = tl.load(start + channels[:, None] * BYTES + inside[None, :], eviction_policy=EVICT)
        columns = block * BLOCK + inside
        if BITS == 8:
            x_tile = load_rows(x, rows, columns, in_features, SHIFTED, WHOLE)
            total = tl.dot(tile, x_tile, total, out_dtype=tl.int32)
        else:
            low = load_rows(x, rows, columns, in_features, SHIFTED, WHOLE)
            high = load_rows(x, rows, columns + HALF, in_features, SHIFTED, WHOLE)
            tile_low, tile_high = split_nibbles(tile)
            if not GROUPED:
                total = tl.dot(tile_low, low, total, out_dtype=tl.int32)
                total = tl.dot(tile_high, high, total, out_dtype=tl.int32)
            else:
                group = groups + block * 2 * stride + channels
                part = tl.dot(tile_low, low, out_dtype=tl.int32)
                total += (part >> 4) * tl.load(group).to(tl.int32)[:, None]
                part = tl.dot(tile_high, high, out_dtype=tl.int32)
                total += (part >> 4) * tl.load(group + stride).to(tl.int32)[:, None]
    return total


@triton.jit
def store_tile(
    sums, out, bias, multiplier, zeros, row_sums, rows, channels, in_rows, out_features, zero_point, qmax, scale,
    EXACT16: tl.constexpr, ZEROS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Sums of a whole row of the weight to outputs ``[rows, channels]``. int32 may wrap on the way, not at the end."""
    inside = channels < out_features
    total = (sums >> 4 if EXACT16 else sums) + tl.load(bias + channels, mask=inside, other=0)[:, None]
    if ZEROS:
        per_row = tl.load(row_sums + rows, mask=rows < in_rows, other=0)
        total -= tl.load(zeros + channels, mask=inside, other=0)[:, None] * per_row[None, :]
    factor = tl.load(multiplier + channels, mask=inside, other=0)[:, None]
    if KIND == 2 or KIND == 3:
        shift = tl.load(multiplier + out_features + channels, mask=inside, other=32)[:, None]
    else:
        shift = factor
    value = to_output(total, factor, shift, zero_point, qmax, scale, KIND, False)
    where = out + rows[:, None].to(tl.int64) * out_features + channels[None, :]
    mask = (rows[:, None] < in_rows) & inside[None, :]
    tl.store(where, tl.trans(value).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["zero_point"])
def decode_kernel(
    x, weight, groups, bias, multiplier, zeros, row_sums, out, partial, counters,
    in_rows, out_features, in_features, stride, blocks, blocks_per_part, zero_point, qmax, scale,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, KIND: tl.constexpr,
    SHIFTED: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Few rows: a program for each tile and, if SPLIT, each part of the columns; programs (tiles, parts).

    The last program to finish a tile adds the parts in their order: one launch, the same bits each time. ``counters``
    are 0 before and after.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    channels = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = part * blocks_per_part
    sums = accumulate(
        x, weight, groups, tl.minimum(rows, in_rows - 1), channels, first, tl.minimum(first + blocks_per_part, blocks),
        in_features, stride, BITS, BLOCK, GROUPED, SHIFTED, WHOLE, BLOCK_N, BLOCK_M, "evict_first",
    )  # fmt: skip
    EXACT16: tl.constexpr = BITS == 4 and not GROUPED
    if SPLIT:
        parts = tl.num_programs(1)
        slots = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        own = partial + (tile * parts).to(tl.int64) * (BLOCK_N * BLOCK_M) + slots
        used = (rows < in_rows)[None, :]
        tl.store(own + part * (BLOCK_N * BLOCK_M), sums, mask=used)
        tl.debug_barrier()  # every thread's part is written before the program is counted
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1:
            sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
            for other in range(0, parts):
                sums += tl.load(own + other * (BLOCK_N * BLOCK_M), mask=used, other=0, cache_modifier=".cg")
            tl.atomic_xchg(counters + tile, 0)
            store_tile(
                sums, out, bias, multiplier, zeros, row_sums, rows, channels, in_rows, out_features, zero_point,
                qmax, scale, EXACT16, ZEROS, KIND,
            )  # fmt: skip
    else:
        store_tile(
            sums, out, bias, multiplier, zeros, row_sums, rows, channels, in_rows, out_features, zero_point,
            qmax, scale, EXACT16, ZEROS, KIND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["zero_point"])
def prefill_kernel(
    x, weight, groups, bias, multiplier, zeros, row_sums, out,
    in_rows, out_features, in_features, stride, blocks, zero_point, qmax, scale,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, KIND: tl.constexpr,
    SHIFTED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Many rows: as many programs as the GPU runs at once, each taking every so-many-th tile.

    Tiles are walked in bands of BAND rows of tiles, so that the activations of a band stay in the L2 cache while the
    weight passes by.
    """
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    tiles_m = tl.cdiv(in_rows, BLOCK_M)
    EXACT16: tl.constexpr = BITS == 4 and not GROUPED
    for tile in range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0)):
        band = tile // (BAND * tiles_n)
        width = tl.minimum(tiles_m - band * BAND, BAND)
        within = tile % (BAND * tiles_n)
        rows = (band * BAND + within % width) * BLOCK_M + tl.arange(0, BLOCK_M)
        channels = (within // width) * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = accumulate(
            x, weight, groups, tl.minimum(rows, in_rows - 1), channels, 0, blocks, in_features, stride, BITS, BLOCK,
            GROUPED, SHIFTED, WHOLE, BLOCK_N, BLOCK_M, "",
        )  # fmt: skip
        store_tile(
            sums, out, bias, multiplier, zeros, row_sums, rows, channels, in_rows, out_features, zero_point, qmax,
            scale, EXACT16, ZEROS, KIND,
        )  # fmt: skip


@triton.jit
def row_sums_kernel(x, sums, in_features, COLUMNS: tl.constexpr):
    """int32 sum of each row of uint8 codes: what the zero points of a weight are multiplied with."""
    row = tl.program_id(0)
    total = tl.zeros((COLUMNS,), dtype=tl.int32)
    for start in range(0, in_features, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        codes = tl.load(x + row.to(tl.int64) * in_features + columns, mask=columns < in_features, other=0)
        total += codes.to(tl.int32)
    tl.store(sums + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["zero_point"])
def finish_wide_kernel(
    parts, bias, multiplier, zeros, row_sums, out, in_rows, out_features, zero_point, qmax, scale,
    ZEROS: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Outputs of 16-bit activations from the int32 sums of their high bytes (first ``in_rows`` rows) and low bytes."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channels < out_features
    high = tl.load(parts + row * out_features + channels, mask=inside, other=0).to(tl.int64)
    low = tl.load(parts + (row + in_rows) * out_features + channels, mask=inside, other=0).to(tl.int64)
    total = high * 256 + low + tl.load(bias + channels, mask=inside, other=0)
    if ZEROS:
        total -= tl.load(zeros + channels, mask=inside, other=0).to(tl.int64) * tl.load(row_sums + row)
    factor = tl.load(multiplier + channels, mask=inside, other=0)
    if KIND == 2 or KIND == 3:
        shift = tl.load(multiplier + out_features + channels, mask=inside, other=32)
    else:
        shift = factor
    value = to_output(total, factor, shift, zero_point, qmax, scale, KIND, True)
    tl.store(out + row * out_features + channels, value.to(out.dtype.element_ty), mask=inside)
