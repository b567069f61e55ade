"""What the compiler makes of the kernels' inner loops: no detours, and no roundings that torch does not make."""

import os
import re

import pytest

pytest.importorskip("triton", minversion="3.6", reason="the GPU kernels are written in Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from optimum_mobilequant.kernels.gpu import configs, epilogue, product  # noqa: E402
from tests.kernels.gpu.compiling import compile_kernel, compile_row  # noqa: E402

HOPPER = configs.TABLE["sm90"]


def between(found, instruction):
    """The PTX from the first to the last product: the inner loop's computations."""
    return found.ptx[found.ptx.index(instruction) : found.ptx.rindex(instruction)]


def test_4_bit_weights_reach_hoppers_product_from_registers():
    """Neither the unpacked weights nor the activations go through shared memory again."""
    found = compile_row("sm90", "w4a8", HOPPER["w4a8"][-1].config, output=epilogue.TOTALS)
    assert "st.shared" not in between(found, "wgmma.mma_async")
    operand = re.search(r"wgmma\.mma_async\S+\s*\{[^}]*\},\s*(\S)", found.ptx)
    assert operand and operand[1] == "{", "the left operand is a descriptor of shared memory"


def test_unpacking_takes_three_instructions_for_eight_weights():
    config = configs.TABLE["sm80"]["w4a8"][0].config
    found = compile_row("sm80", "w4a8", config)
    masks = found.ptx.count("0xf0f0f0f0") + found.ptx.count("-252645136")
    weights = config.block_n * 128 // (config.warps * 32)  # of a thread, in a step of the loop
    assert masks == 2 * weights // 8
    for bytewise in ("prmt", ".b16", ".u8"):
        assert bytewise not in re.sub(r"\.shared\.b16", "", between(found, "mma.sync")), bytewise


def test_bfloat16_is_rounded_to_nearest():
    found = compile_row("sm80", "w8a8", configs.TABLE["sm80"]["w8a8"][0].config, output=epilogue.REAL)
    assert "cvt.rn.bf16" in found.ptx and "cvt.rz" not in found.ptx


def test_both_decodings_for_both_float_types():
    config = configs.TABLE["sm80"]["w4"][0].config
    for dtype, name in (("bf16", "bf16"), ("fp16", "f16")):
        for e0m4 in (False, True):
            if (dtype, e0m4) == ("bf16", False):
                continue  # as in the table
            found = compile_row("sm80", "w4", config, dtype=dtype, e0m4=e0m4)
            assert found.spills == 0 and all(f"f32.{name}.{name}" in product for product in found.products)


def test_small_kernels():
    config = configs.Config(1, 1, 4, 2)
    types = {"x": "*u8", "sums": "*i32"}
    assert compile_kernel(product.row_sums_kernel, {"COLUMNS": 1024}, types, "sm80", config).spills == 0
    types = {
        "parts": "*i32", "bias": "*i64", "multiplier": "*i32", "zeros": "*i32", "row_sums": "*i64", "out": "*i32",
        "scale": "fp32",
    }  # fmt: skip
    constants = {"ZEROS": True, "KIND": epilogue.CODES, "COLUMNS": 256}
    assert compile_kernel(product.finish_wide_kernel, constants, types, "sm80", config).spills == 0


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("kind", ["w4a8", "w4"])
def test_sizes_of_1_compile(kind, row):
    config = configs.TABLE["sm80"][kind][row].config
    ones = ["in_rows", "out_features", "in_features", "blocks"] + (["blocks_per_part"] if config.parts else [])
    assert compile_row("sm80", kind, config, zeros=True, ones=ones).products


def test_parts_are_written_before_they_are_counted_and_read_after():
    """Store, barrier, count with acquire and release, barrier, loads past the first-level cache."""
    found = compile_row("sm80", "w4a8", configs.TABLE["sm80"]["w4a8"][0].config)
    events = re.findall(r"st\.global|bar\.sync|atom\S*acq_rel\.add|ld\.global\.cg", found.ptx)
    count = events.index("atom.global.gpu.acq_rel.add")
    assert events.count("atom.global.gpu.acq_rel.add") == 1
    assert "st.global" in events[:count] and events[count - 1] == "bar.sync" and "ld.global.cg" not in events[:count]
    after = events[count + 1 :]
    assert after[0] == "bar.sync" and "ld.global.cg" in after
