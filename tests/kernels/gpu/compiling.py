"""Compiles the kernels for a GPU that is not there, as a call would, and looks at what came out."""

import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimum_mobilequant.kernels.gpu import configs, epilogue, product, real_product

CAPABILITY = {"sm80": 80, "sm89": 89, "sm90": 90}
POINTERS = {
    "x": "*i8", "weight": "*i8", "groups": "*u8", "bias": "*i32", "multiplier": "*i32", "zeros": "*i32",
    "row_sums": "*i32", "out": "*u8", "partial": "*i32", "counters": "*i32", "scale": "fp32",
}  # fmt: skip
MULTIPLES_OF_16 = ("in_features", "out_features", "stride")


def check(found, arch, kind, config):
    """What must hold of every row of the table."""
    real = kind.startswith("w4") and "a8" not in kind
    numbers = r"\.f32\.bf16\.bf16" if real else r"s32\.s8\.s8"
    assert found.products and all(re.search(numbers, name) for name in found.products), found.products
    warp_group = arch == "sm90" and config.block_n >= 64 and config.warps % 4 == 0
    assert warp_group or arch != "sm90" or config.parts, "many rows on Hopper need its own instruction"
    assert all(name.startswith("wgmma" if warp_group else "mma.sync") for name in found.products), found.products
    assert found.sass and found.spills == 0, found.spills
    assert found.shared <= configs.SHARED_MEMORY[arch]


@dataclass
class Compiled:
    """The PTX, the machine code, the bytes of shared memory."""

    ptx: str
    sass: str
    shared: int

    @property
    def products(self) -> set[str]:
        """The tensor-core instructions."""
        return set(re.findall(r"\b((?:mma\.sync|wgmma\.mma_async)[\w.]*)", self.ptx))

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass))


def compile_kernel(kernel, constants, types, arch, config, block=128):
    """A kernel with all pointers and widths aligned, as layers of real models have them."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name in MULTIPLES_OF_16:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", CAPABILITY[arch], 32)
    found = triton.compile(source, target=target, options=config.options(block))
    return Compiled(found.asm["ptx"], found.asm["sass"], found.metadata.shared)


def compile_row(arch, kind, config, *, output=epilogue.CODES, zeros=False, dtype="bf16", e0m4=False, ones=()):
    """The kernel that a row of the table leads to. ``ones``: arguments that are 1, which Triton makes constants."""
    grouped = kind.endswith("groups")
    block = 256 if grouped else 128  # groups of 128
    shape = {
        "BLOCK": block,
        "GROUPED": grouped,
        "WHOLE": not ones,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
    }
    kernel_constants = {"SPLIT": config.parts > 1} if config.parts else {"BAND": 8}
    kernel_constants |= dict.fromkeys(ones, 1)
    if kind in ("w4", "w4-groups"):
        kernel = real_product.real_decode_kernel if config.parts else real_product.real_prefill_kernel
        types = {
            **POINTERS, "x": f"*{dtype}", "out": f"*{dtype}", "scale": "*fp32", "offset": "*fp32", "sums": "*fp32",
            "bias": "*fp32", "partial": "*fp32",
        }  # fmt: skip
        constants = {**shape, **kernel_constants, "OFFSET": e0m4 or zeros, "BIAS": True, "E0M4": e0m4}
        return compile_kernel(kernel, constants, types, arch, config, block)
    kernel = product.decode_kernel if config.parts else product.prefill_kernel
    constants = {
        **shape, **kernel_constants, "BITS": int(kind[1]), "ZEROS": zeros, "KIND": output,
        "SHIFTED": arch == "sm90" and not config.parts,
    }  # fmt: skip
    kinds = {epilogue.REAL: {"multiplier": "*fp32", "out": "*bf16"}, epilogue.TOTALS: {"out": "*i32"}}
    return compile_kernel(kernel, constants, POINTERS | kinds.get(output, {}), arch, config, block)


def rows(full):
    """Rows of the table as (architecture, kind, configuration): all, or of two kinds the first and the last."""
    return [
        (arch, kind, row.config)
        for arch, kinds in configs.TABLE.items()
        for kind, found in kinds.items()
        if full or (arch != "sm89" and kind in ("w4a8", "w4"))
        for row in (found if full else (found[0], found[-1]))
    ]
