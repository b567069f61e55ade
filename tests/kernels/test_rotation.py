"""The compiled rotation of a head, alone: what the integer numerics define, whatever is added and however large."""

import ctypes
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mobilequant.kernels.cpp import build as building
from optimum_mobilequant.numerics import Grid
from optimum_mobilequant.numerics.integer import Multiplier, requantize, to_grid
from optimum_mobilequant.numerics.integer_elementwise import rotate_pairs

MAIN = """
#include "linear.h"
#include <math.h>
#include <string.h>
namespace mq {
namespace {
#include "rows.h"
}
}
extern "C" void rotate(const int64_t* n, const int32_t* addend, const int32_t* x, const int32_t* cos,
                       const int32_t* sin, int32_t* codes) {
  mq::head_row(mq::Rotation{n[0], n[1], n[2], n[3], n[4], n[5], addend}, x, cos, sin, codes);
}
"""


@pytest.fixture(scope="module", params=["integers", "doubles"])
def rotate(request, tmp_path_factory):
    """The portable form, and the one of the other instruction sets."""
    try:
        compiler = building.find_compiler()
    except building.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("rotation")
    (folder / "main.cpp").write_text(MAIN, encoding="utf-8")
    flags = [*building._FLAGS, "-fvisibility=default", f"-I{building._HERE}"]
    flags += ["-DMQ_GENERIC"] if request.param == "integers" else []
    subprocess.run([compiler, *flags, "-shared", folder / "main.cpp", "-o", folder / "rotate.so"], check=True)
    return ctypes.CDLL(str(folder / "rotate.so")).rotate


def drawn(generator, shape, low, high):
    """int64 from low to high, both included; every third one is an end."""
    values = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.tensor([low, high])[torch.randint(2, shape, generator=generator)]
    return torch.where(torch.randint(3, shape, generator=generator) == 0, ends, values)


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([8, 16]),
    out_bits=st.sampled_from([8, 16]),
    sizes=st.tuples(st.integers(0, 10), st.integers(0, 9)).filter(any),
    exponent=st.integers(-32, 1),
    power=st.booleans(),  # of two: ties
    adds=st.booleans(),
)
def test_it_is_the_numerics_own(rotate, seed, bits, out_bits, sizes, exponent, power, adds):
    generator = torch.Generator().manual_seed(seed)
    half, dims = sizes[0], 2 * sizes[0] + sizes[1]
    x = drawn(generator, (dims,), 1 - 2**bits, 2**bits - 1)
    cos, sin = (drawn(generator, (half,), -(2**14), 2**14) for _ in range(2))
    addend = drawn(generator, (dims,), -(2**15), 2**15 - 1) << bits
    multiplier = Multiplier.of(2.0**exponent * (1.0 if power else 1.0 + float(torch.rand((), generator=generator))))
    grid = Grid(out_bits, signed=False)
    zero = int(torch.randint(grid.qmax + 1, (), generator=generator))
    check(rotate, x, cos, sin, addend if adds else None, multiplier, zero, grid)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_keep_their_sign(rotate, sign):
    """Their products with the largest mantissa leave int64 with the half that rounds them."""
    x, turn = torch.tensor([65535, -65535]) * sign, torch.tensor([round(2**13.5)])
    addend = torch.tensor([32767, -32767]) * sign << 16
    check(rotate, x, turn, turn, addend, Multiplier.of(2.0**-31 * (1 - 2.0**-31)), 128, Grid(8, signed=False))


def check(rotate, x, cos, sin, addend, multiplier, zero, grid):
    turned = rotate_pairs(x, cos, sin, 2 * len(cos))
    expected = to_grid(requantize(turned if addend is None else turned + addend, multiplier), zero, grid)
    numbers = torch.tensor([len(x), len(cos), int(multiplier.mantissa), int(multiplier.shift), zero, grid.qmax])
    operands = [None if t is None else t.to(torch.int32) for t in (addend, x, cos, sin)]
    found = torch.full((len(x),), -1, dtype=torch.int32)
    rotate(*(None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (numbers, *operands, found)))
    assert torch.equal(found, expected.to(torch.int32))
