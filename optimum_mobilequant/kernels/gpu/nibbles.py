"""4-bit codes to 16-bit floats inside a kernel, four bytes at a time.

A byte holds two codes plus 8, ``u`` from 0 to 15. Two ways to decode one, both exact:

- ``int4``: u below the mantissa's end of 128 (bfloat16) or 1024 (float16), less that and 8: the code itself.
- ``e0m4``: u at the top of the mantissa of 1: ``1 + u / 16``; mask, shift and or, no arithmetic. Scale and offset take
  the rest: ``s * code = 16 s * (1 + u / 16) - 24 s``. (Transformer-Lite, Li et al. 2024, section 3.3, "M0E4".)

The instructions are written out, because the compiler would take the bytes one by one. The interpreter, which knows no
instructions, computes the same in plain operations; ``tests/kernels/gpu`` holds the two against each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Bytes a, b, c, d to the 16-bit fields (a, b) and (c, d).
_SPREAD = ".reg .b32 t, u; prmt.b32 t, $4, 0, 0x4140; prmt.b32 u, $4, 0, 0x4342; "


def _e0m4(low: str, high: str, one: str) -> str:
    """``low``, ``high``: instructions that bring a masked half of a byte to the top of the mantissa."""
    return (
        "{ " + _SPREAD + "and.b32 $0, t, 0x000f000f; and.b32 $1, u, 0x000f000f; "
        f"{low.format('$0')} {low.format('$1')} or.b32 $0, $0, {one}; or.b32 $1, $1, {one}; "
        f"and.b32 $2, t, 0x00f000f0; and.b32 $3, u, 0x00f000f0; "
        f"{high.format('$2')} {high.format('$3')} or.b32 $2, $2, {one}; or.b32 $3, $3, {one}; }}"
    )


def _int4(base: str, constants: str, subtract: str) -> str:
    """``base``: the bits of a power of two whose mantissa counts ones. ``subtract``: it and 8 from a pair."""
    return (
        "{ " + _SPREAD + constants + f" and.b32 $0, t, 0x000f000f; or.b32 $0, $0, {base}; {subtract.format('$0')} "
        f"and.b32 $1, u, 0x000f000f; or.b32 $1, $1, {base}; {subtract.format('$1')} "
        f"shr.b32 $2, t, 4; and.b32 $2, $2, 0x000f000f; or.b32 $2, $2, {base}; {subtract.format('$2')} "
        f"shr.b32 $3, u, 4; and.b32 $3, $3, 0x000f000f; or.b32 $3, $3, {base}; {subtract.format('$3')} }}"
    )


# bfloat16 has no subtraction before compute capability 9.0, but a fused multiply-add: x * 1 + (-136).
INSTRUCTIONS = {
    ("e0m4", "bf16"): _e0m4("shl.b32 {0}, {0}, 3;", "shr.b32 {0}, {0}, 1;", "0x3f803f80"),
    ("e0m4", "fp16"): _e0m4("shl.b32 {0}, {0}, 6;", "shl.b32 {0}, {0}, 2;", "0x3c003c00"),
    ("int4", "bf16"): _int4(
        "0x43004300", ".reg .b32 v, w; mov.b32 v, 0x3f803f80; mov.b32 w, 0xc308c308;", "fma.rn.bf16x2 {0}, {0}, v, w;"
    ),
    ("int4", "fp16"): _int4("0x64006400", ".reg .b32 v; mov.b32 v, 0x64086408;", "sub.rn.f16x2 {0}, {0}, v;"),
}
E0M4_BF16 = tl.constexpr(INSTRUCTIONS["e0m4", "bf16"])
E0M4_FP16 = tl.constexpr(INSTRUCTIONS["e0m4", "fp16"])
INT4_BF16 = tl.constexpr(INSTRUCTIONS["int4", "bf16"])
INT4_FP16 = tl.constexpr(INSTRUCTIONS["int4", "fp16"])


@triton.jit
def decode(tile, E0M4: tl.constexpr, TYPE: tl.constexpr):
    """Both halves of int8 bytes as floats of TYPE (bfloat16 or float16)."""
    if INTERPRETED:
        low = ((tile & 15).to(tl.float32) / 16 + 1) if E0M4 else ((tile & 15).to(tl.float32) - 8)
        top = (tile >> 4) & 15
        high = (top.to(tl.float32) / 16 + 1) if E0M4 else (top.to(tl.float32) - 8)
        low, high = low.to(TYPE), high.to(TYPE)
    else:
        if TYPE == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                E0M4_BF16 if E0M4 else INT4_BF16, "=&r,=&r,=&r,=&r,r", [tile], dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True, pack=4,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                E0M4_FP16 if E0M4 else INT4_FP16, "=&r,=&r,=&r,=&r,r", [tile], dtype=(tl.float16, tl.float16),
                is_pure=True, pack=4,
            )  # fmt: skip
    return low, high
