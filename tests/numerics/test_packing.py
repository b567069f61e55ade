"""Two 4-bit codes in a byte, in optimum-quanto's layout; 3-bit codes in planes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimum.quanto.tensor.packed import PackedTensor

from optimum_mobilequant.numerics.packing import (
    pack_int4,
    pack_planes,
    unpack_int4,
    unpack_int4_rows,
    unpack_planes,
    unpack_planes_rows,
)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 7))


def random_codes(shape, seed):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@given(shapes, st.integers(0, 99))
def test_unpacking_restores_every_code(shape, seed):
    codes = random_codes(shape, seed)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((shape[0] + 1) // 2, shape[1])
    restored = unpack_int4(packed, shape[0])
    assert restored.dtype == torch.int8
    assert torch.equal(restored, codes)


@given(shapes, st.integers(0, 99))
def test_bytes_are_those_of_quanto(shape, seed):
    codes = random_codes(shape, seed)
    theirs = PackedTensor.pack((codes.short() + 8).to(torch.uint8), bits=4)
    packed = pack_int4(codes)
    assert torch.equal(packed, theirs._data)
    wrapped = PackedTensor(packed, 4, torch.Size(shape), (shape[1], 1))
    assert torch.equal(wrapped.unpack().to(torch.int8) - 8, codes)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("index_shape", [(), (4,), (2, 3)])
def test_single_rows_are_read_without_unpacking_the_rest(rows, index_shape):
    codes = random_codes((rows, 6), rows)
    index = torch.randint(0, rows, index_shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_int4_rows(pack_int4(codes), index, rows), codes[index])


def test_an_odd_last_row_leaves_the_high_nibble_empty():
    packed = pack_int4(torch.full((3, 2), 7, dtype=torch.int8))
    assert packed.tolist() == [[0xFF, 0xFF], [0x0F, 0x0F]]


def test_packing_does_not_write_into_its_input():
    codes = random_codes((5, 4), 0)
    kept = codes.clone()
    pack_int4(codes)
    assert torch.equal(codes, kept)


@given(st.tuples(st.integers(1, 20), st.integers(1, 7)), st.integers(2, 8), st.integers(0, 99))
def test_planes_restore_every_code_and_row(shape, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)
    packed = pack_planes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (bits, -(-shape[0] // 8), shape[1])  # no bit is wasted where rows are a multiple of 8
    assert torch.equal(unpack_planes(packed, shape[0]), codes)
    index = torch.randint(0, shape[0], (3, 2), generator=generator)
    assert torch.equal(unpack_planes_rows(packed, index), codes[index])


def test_a_plane_holds_one_bit_of_eight_rows():
    packed = pack_planes(torch.tensor([[-4], [-3], [-2], [-1], [0], [1], [2], [3], [3]]), 3)
    # height 2: rows 0, 2, 4, 6, 8 in byte row 0, rows 1, 3, 5, 7 in byte row 1
    assert packed[:, :, 0].tolist() == [[0b10000, 0b1111], [0b11010, 0b1010], [0b11100, 0b1100]]
