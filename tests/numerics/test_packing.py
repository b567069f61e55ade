"""Two 4-bit codes in a byte, in optimum-quanto's layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimum.quanto.tensor.packed import PackedTensor

from optimum_mobilequant.numerics.packing import pack_int4, unpack_int4, unpack_int4_rows

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
