"""The written-out instructions, executed here on the few instructions of PTX that they use."""

import re

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the GPU kernels are written in Triton")

from optimum_mobilequant.kernels.gpu import nibbles, product  # noqa: E402

MASK = 0xFFFFFFFF
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def halves(word, dtype):
    words = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
    return words.view(dtype).to(torch.float64)


def joined(values, dtype):
    low, high = values.to(dtype).view(torch.int16).to(torch.int32).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def permuted(a, b, selector):
    found = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(found[selector >> 4 * i & 15] for i in range(4)), "little")


def execute(text, outputs, word):
    """Values of the output registers ``$0`` to ``$<outputs - 1>`` for the input register behind them."""
    registers = {f"${outputs}": word}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    for line in filter(None, (part.strip() for part in re.sub(r"^\{|\}$", "", text.strip()).split(";"))):
        name, _, rest = line.partition(" ")
        target, *sources = (part.strip() for part in rest.split(","))
        if name == ".reg":
            continue
        a = [value(source) for source in sources]
        integer = {
            "and.b32": lambda a: a[0] & a[1], "or.b32": lambda a: a[0] | a[1], "xor.b32": lambda a: a[0] ^ a[1],
            "shl.b32": lambda a: a[0] << a[1] & MASK, "shr.b32": lambda a: a[0] >> a[1], "mov.b32": lambda a: a[0],
            "prmt.b32": lambda a: permuted(*a),
            "fma.rn.bf16x2": lambda a: joined(
                halves(a[0], torch.bfloat16) * halves(a[1], torch.bfloat16) + halves(a[2], torch.bfloat16),
                torch.bfloat16,
            ),
            "sub.rn.f16x2": lambda a: joined(halves(a[0], torch.float16) - halves(a[1], torch.float16), torch.float16),
        }  # fmt: skip
        registers[target] = integer[name](a)
    return [registers[f"${index}"] for index in range(outputs)]


def words():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (200, 4), generator=generator).tolist()
    return [*rows, [0, 0, 0, 0], [255, 255, 255, 255], [0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]]


def signed(byte):
    return byte - 256 if byte > 127 else byte


def test_halves_of_bytes_become_16_times_their_signed_value():
    for row in words():
        low, high = execute(product.SPLIT_NIBBLES.value, 2, int.from_bytes(bytes(row), "little"))
        nibble = [(signed(byte << 4 & 255), signed(byte & 240)) for byte in row]
        assert [signed(byte) for byte in low.to_bytes(4, "little")] == [found[0] for found in nibble]
        assert [signed(byte) for byte in high.to_bytes(4, "little")] == [found[1] for found in nibble]
        assert all(value % 16 == 0 for found in nibble for value in found)


def test_top_bits_make_unsigned_codes_signed():
    for row in words():
        (found,) = execute(product.FLIP_TOP_BITS.value, 1, int.from_bytes(bytes(row), "little"))
        assert [signed(byte) for byte in found.to_bytes(4, "little")] == [byte - 128 for byte in row]


@pytest.mark.parametrize(("decode", "dtype"), nibbles.INSTRUCTIONS)
def test_decoded_floats_are_exact(decode, dtype):
    for row in words():
        found = execute(nibbles.INSTRUCTIONS[decode, dtype], 4, int.from_bytes(bytes(row), "little"))
        values = torch.cat([halves(word, DTYPES[dtype]) for word in found]).tolist()
        codes = [byte & 15 for byte in row] + [byte >> 4 for byte in row]
        expected = [1 + code / 16 if decode == "e0m4" else code - 8 for code in codes]
        assert values == expected, row


def test_the_execution_sees_a_wrong_constant():
    wrong = product.SPLIT_NIBBLES.value.replace("shl.b32 $0, $2, 4", "shl.b32 $0, $2, 3")
    assert execute(wrong, 2, 0x01010101)[0] != execute(product.SPLIT_NIBBLES.value, 2, 0x01010101)[0]
