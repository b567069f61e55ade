"""Compiled elementwise passes of tuning on the CPU: rounding and its gradients in one walk through memory each.

``numerics.fake``, ``numerics.fake_weight``, norms and the student's attention use them where a compiler is at hand.
Without one they compute the same by torch's operations, in several walks.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...log import get_logger
from ..cpp.build import BuildError
from .build import build_passes

logger = get_logger(__name__)

# "0" leaves the passes to torch.
VARIABLE = "MOBILEQUANT_TUNING_KERNELS"

_GRID = [c_float] * 3  # scale, lowest and highest code less the zero point
_FUNCTIONS = {
    "mq_snap": [c_void_p, c_void_p, c_int64, *_GRID, c_int],
    "mq_snap_backward": [*[c_void_p] * 3, c_int64, *_GRID, *[c_float] * 2, c_void_p, c_int],
    "mq_probabilities": [*[c_void_p] * 2, *[c_int64] * 3, c_float, *_GRID, c_void_p, c_int],
    "mq_slope": [*[c_void_p] * 2, *[c_int64] * 2, c_float, *_GRID, c_int],
    "mq_weight_range": [*[c_void_p] * 6, *[c_int64] * 2, c_int],
    "mq_weight_snap": [*[c_void_p] * 7, *[c_int64] * 2, c_int],
    "mq_weight_backward": [*[c_void_p] * 10, *[c_int64] * 2, *[c_void_p] * 3, c_int],
    "mq_offset": [*[c_void_p] * 6, *[c_int64] * 2, c_int],
    "mq_offset_backward": [*[c_void_p] * 8, *[c_int64] * 2, c_int],
    "mq_norm_backward": [*[c_void_p] * 6, *[c_int64] * 2, c_int],
}
Codes = tuple[float, float, float]  # scale, lowest and highest code less the zero point


class Passes:
    """The compiled functions. All tensors are float32 and dense; those of one call lie alike in memory.

    Raises:
        BuildError: the file cannot be loaded.
    """

    def __init__(self, path: Path):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"cannot be loaded: {error}; delete {path} to compile again") from None
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = None, arguments
        library.mq_divergence.restype = c_double
        library.mq_divergence.argtypes = [*[c_void_p] * 3, *[c_int64] * 2, c_int]
        self._library = library

    def snap(self, x: Tensor, out: Tensor, codes: Codes) -> Tensor:
        """Round ``x`` to a grid; ``out`` may be ``x``."""
        self._library.mq_snap(x.data_ptr(), out.data_ptr(), x.numel(), *codes, torch.get_num_threads())
        return out

    def snap_backward(
        self, grad: Tensor, x: Tensor, codes: Codes, below: float, above: float
    ) -> tuple[Tensor, float, float]:
        """``grad`` where ``x`` lies within (below, above), else 0; ``sum(grad * (snap(x) - x where within))``; and
        the sum of ``grad`` elsewhere."""
        out, sums = torch.empty_like(x), (c_double * 2)()
        self._library.mq_snap_backward(
            grad.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel(), *codes, below, above, sums,
            torch.get_num_threads(),
        )  # fmt: skip
        return out, sums[0], sums[1]

    def probabilities_(
        self, x: Tensor, mask: Tensor | None, scaling: float, codes: Codes, rounded: Codes | None = None
    ) -> Tensor:
        """``softmax(snap(x * scaling) + mask)`` in place, rounded to ``rounded`` unless None; ``x`` ``[rows, keys]``,
        ``mask`` ``[period, keys]``, taken in turn."""
        place, period = (None, 1) if mask is None else (mask.data_ptr(), len(mask))
        own = None if rounded is None else (c_float * 3)(*rounded)
        self._library.mq_probabilities(
            x.data_ptr(), place, *x.shape, period, scaling, *codes, own, torch.get_num_threads()
        )
        return x

    def slope_(self, p: Tensor, grad: Tensor, scaling: float, codes: Codes) -> None:
        """Backward pass of softmax: ``grad``, of the probabilities ``p``, becomes the scores' times ``scaling``, and
        ``p`` is rounded, both in place. ``[rows, columns]``."""
        self._library.mq_slope(p.data_ptr(), grad.data_ptr(), *p.shape, scaling, *codes, torch.get_num_threads())

    def weight_range(self, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """``rows[:, None] * weight * columns[None, :]``, and the lowest and highest of each row, ``[2, out]``."""
        out, ends = torch.empty_like(weight), weight.new_empty(2, len(weight))
        places = _places(weight, rows, columns, out, ends[0], ends[1])
        self._library.mq_weight_range(*places, *weight.shape, torch.get_num_threads())
        return out, ends

    def weight_snap(
        self, weight: Tensor, rows: Tensor | None, columns: Tensor | None, codes: tuple[Tensor, ...], out: Tensor
    ) -> Tensor:
        """The rescaled weight rounded, into ``out``. ``codes``: scale, lowest and highest code of each row."""
        places = _places(weight, rows, columns, out, *codes)
        self._library.mq_weight_snap(*places, *weight.shape, torch.get_num_threads())
        return out

    def weight_backward(
        self, grad: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, codes: tuple[Tensor, ...],
        below: Tensor, above: Tensor, ends: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """With ``x`` the rescaled weight, "within" the elements inside (below, above) of their row:

        Returns:
            sums over each row, ``[3, out]``: of ``grad * (snap(x) - x where within)``, of ``grad`` elsewhere, of
            ``grad * x`` within; sums of the last over each column, ``[in]``; and where a row holds its ``ends``,
            int64 ``[2, out]``.
        """
        sums, by_column = weight.new_empty(3, len(weight)), weight.new_empty(weight.shape[1])
        found = torch.empty(2, len(weight), dtype=torch.int64)
        read, written = (
            _places(grad, weight, rows, columns, *codes, below, above, ends),
            _places(sums, by_column, found),
        )
        self._library.mq_weight_backward(*read, *weight.shape, *written, torch.get_num_threads())
        return sums, by_column, found

    def offset(self, base: Tensor, offset: Tensor, codes: tuple[Tensor, ...]) -> Tensor:
        """``base + offset``, in steps, rounded to codes and scaled. ``codes``: as in :meth:`weight_snap`."""
        out = torch.empty_like(base)
        self._library.mq_offset(*_places(base, offset, out, *codes), *base.shape, torch.get_num_threads())
        return out

    def offset_backward(
        self, grad: Tensor, base: Tensor, offset: Tensor, codes: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the offset ``[out, in]`` and of the logarithm of each step ``[out]``."""
        out, gains = torch.empty_like(base), base.new_empty(len(base))
        places = _places(grad, base, offset, *codes, out, gains)
        self._library.mq_offset_backward(*places, *base.shape, torch.get_num_threads())
        return out, gains

    def norm_backward(self, grad: Tensor, x: Tensor, inverse: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` ``[..., n]`` and ``gain`` ``[n]`` in ``gain * x * inverse``, with ``inverse``
        ``[..., 1]`` one over the root mean square of ``x``. All contiguous."""
        out, gains = torch.empty_like(x), torch.empty_like(gain)
        places = _places(grad, x, inverse, gain, out, gains)
        self._library.mq_norm_backward(*places, inverse.numel(), len(gain), torch.get_num_threads())
        return out, gains

    def divergence(self, student: Tensor, teacher: Tensor, slope: Tensor | None) -> float:
        """Sum of KL(teacher || student) over rows of logits ``[rows, vocabulary]``; into ``slope``, unless None, its
        gradient."""
        places = _places(student, teacher, slope)
        found: float = self._library.mq_divergence(*places, *student.shape, torch.get_num_threads())
        return found


def _places(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@cache
def passes() -> Passes | None:
    """The compiled passes, compiled if they are not in the cache (some seconds); None, said once, without a compiler
    or a folder to write in, or where MOBILEQUANT_TUNING_KERNELS is 0."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        return Passes(build_passes())
    except BuildError as error:
        logger.warning(f"tuning takes longer on this CPU, its compiled passes are not used: {error}")
        return None
