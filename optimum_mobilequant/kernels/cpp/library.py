"""The compiled kernels as Python calls: addresses and sizes in, tensors out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ...log import get_logger
from ..spec import Output, Packed
from .build import BuildError
from .memory import packed_memory

logger = get_logger(__name__)

ISA_VARIABLE = "MOBILEQUANT_ISA"

# name -> (result, arguments), as declared in dispatch.cpp
_FUNCTIONS = {
    "mq_threads_supported": (c_int, []),
    "mq_isa": (c_char_p, [c_int]),
    "mq_self_check": (c_int, [c_int]),
    "mq_packed_bytes": (c_int64, [c_int64, c_int64, c_int]),
    "mq_pack": (None, [c_void_p, c_int64, c_int64, c_int, c_void_p]),
    "mq_linear": (
        c_int,
        [c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 3, *[c_int] * 4, c_float, c_int, c_int],
    ),
    "mq_linear_wide": (
        c_int,
        [*[c_void_p] * 2, c_int64, *[c_void_p] * 4, *[c_int64] * 3, *[c_int] * 4, c_float, c_int, c_int],
    ),
    "mq_layer_fields": (c_char_p, []),
    "mq_layer": (
        c_int,
        [
            *[c_void_p] * 4,
            c_int64,
            c_void_p,
            *[c_int64] * 2,
            *[c_void_p] * 3,
            *[c_int64] * 4,
            *[c_void_p] * 5,
            c_int,
            c_int,
        ],
    ),
    "mq_norm": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int]),
    "mq_quantize": (None, [c_void_p, c_int, c_int64, c_float, c_int, c_void_p, c_int, c_int]),
}

# (dtype, is there a grid) -> Output of linear.h
_OUTPUTS = {
    (torch.int32, False): 0,
    (torch.uint8, True): 1,
    (torch.int32, True): 2,
    (torch.float32, False): 3,
    (torch.bfloat16, False): 4,
    (torch.float32, True): 5,
    (torch.bfloat16, True): 6,
}

# What mq_linear returns.
_FAILURES: dict[int, type[Exception]] = {1: MemoryError, 2: ValueError}
_REASONS = {1: "no memory for its working copies", 2: "the weight was packed for another layer"}


class Library:
    """The shared library, with one instruction set chosen.

    Args:
        path: the compiled file.
        isa: ``"amx"``, ``"avx512vnni"``, ``"avxvnni"``, ``"avx2"``, ``"neon"`` or ``"generic"``; None for the
            environment variable MOBILEQUANT_ISA or else the best one that the processor has. Each is checked against
            the portable kernels first; one that computes wrong results is left out, with a warning.

    Attributes:
        isa: the one in use. wrong: those the processor has that compute wrong results here.

    Raises:
        BuildError: the file cannot be loaded, the processor lacks the instruction set asked for, or what that one
            computes is wrong.
    """

    def __init__(self, path: Path, isa: str | None = None):
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"the compiled kernels cannot be loaded: {error}; delete {path} to compile again"
            ) from None
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._linear = self._library.mq_linear
        present = self._instruction_sets()
        wanted = isa or os.environ.get(ISA_VARIABLE)
        if wanted and wanted not in present:
            raise BuildError(
                f"{ISA_VARIABLE}={wanted} is not one of {', '.join(present)}, which run on this processor"
            )
        names = [wanted] if wanted else list(present)
        right = (name for name in names if self._library.mq_self_check(present[name]) == 1)
        chosen = next(right, None)
        if chosen is None:
            raise BuildError(f"the compiled {names[0]} kernels compute wrong results here; please report this")
        self.isa: str = chosen
        self.wrong: tuple[str, ...] = tuple(names[: names.index(chosen)])
        self._isa = present[chosen]
        if self.wrong:
            logger.warning(
                f"the compiled {' and '.join(self.wrong)} kernels compute wrong results on this processor and are not "
                f"used, {chosen} takes their place; please report this"
            )

    def _instruction_sets(self) -> dict[str, int]:
        """Those this processor has, best first, with their index."""
        found, index = {}, 0
        while (name := self._library.mq_isa(index)) is not None:
            if name:
                found[name.decode()] = index
            index += 1
        return found

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Names of those compiled in that this processor has, best first."""
        return tuple(self._instruction_sets())

    @property
    def threaded(self) -> bool:
        """Whether the library was compiled with OpenMP."""
        return bool(self._library.mq_threads_supported())

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """Codes (int8, contiguous ``[out, in]``) in the layout of linear.h: uint8, one axis."""
        rows, columns = codes.shape
        packed = packed_memory(self._library.mq_packed_bytes(rows, columns, bits))
        self._library.mq_pack(codes.data_ptr(), rows, columns, bits, packed.data_ptr())
        return packed

    def linear(self, x: Tensor, packed: Packed, output: Output, bits: int) -> Tensor:
        """The layer on uint8 ``x`` ``[..., in]``; ``packed`` as the backend packed it.

        Raises:
            ValueError: tensors that were not packed for these sizes and this output.
            MemoryError: no memory for the working copies.
        """
        columns, rows = x.shape[-1], packed.bias.shape[0]
        if x.dim() != 2:
            x = x.reshape(-1, columns)
        if x.stride(1) != 1 and columns > 1:
            x = x.contiguous()
        count, zero = x.shape[0], packed.weight_zero_point
        out = torch.empty((count, rows), dtype=output.dtype, device="cpu")
        multipliers = 2 * rows if output.qmax else rows
        if not output.is_totals and packed.multiplier.numel() != multipliers:
            raise ValueError("the multipliers were packed for another layer or output")
        failure = self._linear(
            x.data_ptr(), x.stride(0), packed.weight.data_ptr(), packed.weight.numel(), packed.bias.data_ptr(),
            None if zero is None else zero.data_ptr(), packed.multiplier.data_ptr(), out.data_ptr(),
            count, rows, columns, bits, _OUTPUTS[output.dtype, output.qmax > 0], output.zero_point, output.qmax,
            output.scale, torch.get_num_threads(), self._isa,
        )  # fmt: skip
        if failure:
            raise _FAILURES[failure](f"a linear layer of {columns} columns on {count} rows: {_REASONS[failure]}")
        return out

    def linear_wide(self, x: Tensor, packed: Packed, output: Output, bits: int) -> Tensor:
        """The layer on 16-bit codes, int32 ``[rows, in]`` contiguous; ``output``: 16-bit codes or grid values."""
        (count, columns), rows, zero = x.shape, packed.bias.shape[0], packed.weight_zero_point
        out = torch.empty((count, rows), dtype=output.dtype, device="cpu")
        failure = self._library.mq_linear_wide(
            x.data_ptr(), packed.weight.data_ptr(), packed.weight.numel(), packed.bias.data_ptr(),
            None if zero is None else zero.data_ptr(), packed.multiplier.data_ptr(), out.data_ptr(),
            count, rows, columns, bits, _OUTPUTS[output.dtype, True], output.zero_point, output.qmax, output.scale,
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        if failure:
            raise _FAILURES[failure](f"a linear layer of {columns} columns on {count} rows: {_REASONS[failure]}")
        return out

    def layer_fields(self) -> list[str]:
        """Names of the numbers that a block of constants of :meth:`layer` starts with."""
        return [name for name in self._library.mq_layer_fields().decode().split(",") if name]

    def layer(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, key_sums: Tensor,
        values: Tensor, past: int, block: Tensor, weights: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """A decoder layer; see ``layer.h``. All tensors contiguous, floats float32.

        Args:
            x: ``[batch, sequence, hidden]``. mask: ``[batch or 1, 1, sequence, columns]`` or None.
            cos, sin: ``[batch or 1, sequence, rotary dims]``. keys, key_sums, values: the cache, written at ``past``.
            block: constants. weights: packed, of qkv, o, gate and up, down.
        """
        out = torch.empty_like(x)
        batch, sequence, _ = x.shape
        failure = self._library.mq_layer(
            x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[0],
            None if mask is None else mask.data_ptr(), 1 if mask is None else mask.shape[0],
            0 if mask is None else mask.shape[3], keys.data_ptr(), key_sums.data_ptr(), values.data_ptr(),
            key_sums.shape[2], past, batch, sequence, block.data_ptr(), *(weight.data_ptr() for weight in weights),
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        if failure:
            raise MemoryError(f"no memory for a decoder layer on {batch} x {sequence} tokens after {past}")
        return out

    def norm(self, x: Tensor, block: Tensor) -> Tensor:
        """A norm of float32 rows ``[..., width]``, contiguous, on its input's grid."""
        out = torch.empty_like(x)
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if rows and self._library.mq_norm(
            x.data_ptr(), out.data_ptr(), rows, block.data_ptr(), torch.get_num_threads(), self._isa
        ):
            raise MemoryError(f"no memory for a norm of {rows} rows")
        return out

    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Codes of float32 or bfloat16 ``x`` on the 8-bit activation grid: those of :func:`~...numerics.quantize`."""
        x = x.contiguous()
        codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
        self._library.mq_quantize(
            x.data_ptr(), int(x.dtype == torch.bfloat16), x.numel(), scale, zero_point, codes.data_ptr(),
            torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return codes
