"""Memory of packed weights: as much as they fill, aligned, and given back."""

import copy
import mmap
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from optimum_mobilequant.kernels import cpp
from optimum_mobilequant.kernels.cpp import memory
from optimum_mobilequant.kernels.cpp.memory import HUGE_PAGE, copy_packed, packed_memory
from tests.kernels.layers import library

compiled_here = pytest.mark.skipif(bool(cpp.available()), reason=f"compiled kernels: {cpp.available()}")
tells_memory = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("size", [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 4097, 5 * HUGE_PAGE // 2])
def test_it_is_aligned_and_no_larger_than_asked(size):
    found = packed_memory(size)
    assert found.dtype == torch.uint8 and found.shape == (size,)
    assert found.untyped_storage().nbytes() == size  # what `resident_bytes` of the benchmarks counts
    assert not size or found.data_ptr() % (HUGE_PAGE if size >= HUGE_PAGE else 64) == 0
    found.fill_(7)
    assert int(found.sum(dtype=torch.int64)) == 7 * size


@compiled_here
@tells_memory
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_take_what_they_hold_and_give_it_back(bits):
    codes = torch.randint(-8, 8, (1100, 5000), dtype=torch.int8)
    library().pack(codes, bits)
    torch.full((64 * 2**20,), 1, dtype=torch.uint8)  # freed: memory that an allocator could hand out once more
    before = resident()
    weights = [library().pack(codes, bits) for _ in range(12)]
    taken, size = resident() - before, sum(weight.numel() for weight in weights)
    assert size == 12 * (5000 * bits // 8 + 4) * 1152  # 18 panels of 64 channels
    assert 0.95 * size < taken < 1.05 * size
    del weights
    assert resident() - before < 0.05 * size


@compiled_here
def test_copies_hold_the_same_and_have_memory_of_their_own():
    packed = library().pack(torch.randint(-128, 128, (1100, 2100), dtype=torch.int8), 8)
    expected = packed.clone()
    copies = [copy_packed(packed), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.clone()]
    shared = packed.clone().share_memory_()
    part = packed[HUGE_PAGE:]
    del packed
    assert torch.equal(part, expected[HUGE_PAGE:])  # a view keeps the whole mapping
    for made in (*copies, shared):
        assert torch.equal(made, expected)
        made.zero_()
    assert torch.equal(part, expected[HUGE_PAGE:])
    assert copies[0].data_ptr() % HUGE_PAGE == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_writes_into_its_own_copy():
    packed = packed_memory(HUGE_PAGE).fill_(1)
    child = os.fork()
    if not child:
        packed.numpy()[:] = 2
        os._exit(int(packed.numpy()[-1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert bool((packed == 1).all())


def test_other_systems(monkeypatch):
    for name in ("MAP_PRIVATE", "MADV_HUGEPAGE"):
        monkeypatch.delattr(mmap, name, raising=False)
    found = packed_memory(HUGE_PAGE + 3)
    assert found.data_ptr() % HUGE_PAGE == 0 and not found.any()


def test_no_memory_is_said(monkeypatch):
    def full(size):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "_mapping", full)
    with pytest.raises(MemoryError, match="packed weight of 4194304 bytes: .*Cannot allocate"):
        packed_memory(2 * HUGE_PAGE)
