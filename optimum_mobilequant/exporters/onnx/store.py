"""The one file of weights that all graphs of an export share.

Tensors are written as they are asked for, one at a time, so neither the graphs' protos nor this process ever hold all
of them; offsets are plain integers, so the file may grow beyond 2 GiB, the limit of a proto.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
from numpy.typing import NDArray

Array = NDArray[np.generic]
# Below this a tensor stays in the proto: shapes and scales that tools read without opening another file.
INLINE_BYTES = 1024
# Runtimes map large tensors straight from the file, which needs page boundaries.
_PAGE, _LINE, _LARGE = 4096, 64, 1 << 20


class WeightStore:
    """Writes initializers to ``path``; a context manager.

    Args:
        path: the file; made new.
        inline_bytes: smaller tensors go into the proto.
    """

    def __init__(self, path: Path, *, inline_bytes: int = INLINE_BYTES):
        self.path, self.inline_bytes = path, inline_bytes
        self._file = path.open("xb")
        self._known: dict[str, onnx.TensorProto] = {}

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def tensor(self, name: str, make: Callable[[], tuple[int, Array]]) -> onnx.TensorProto:
        """The initializer called ``name``: the one written before, or what ``make`` returns (ONNX type, values).

        4-bit values come as int8 and are packed two in a byte, the earlier one low (ONNX's own layout).
        """
        if name not in self._known:
            kind, values = make()
            dims = values.shape
            if kind == onnx.TensorProto.INT4:
                values = pack_nibbles(values)
            proto = onnx.TensorProto(name=name, data_type=kind, dims=dims)
            data = np.ascontiguousarray(values)
            if data.nbytes < self.inline_bytes:
                proto.raw_data = data.tobytes()
            else:
                self._append(proto, data)
            self._known[name] = proto
        return self._known[name]

    def _append(self, proto: onnx.TensorProto, data: Array) -> None:
        step = _PAGE if data.nbytes >= _LARGE else _LINE
        offset = -(-self._file.tell() // step) * step
        self._file.seek(offset)
        self._file.write(data.data)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", data.nbytes)):
            proto.external_data.add(key=key, value=str(value))


def pack_nibbles(codes: Array) -> NDArray[np.uint8]:
    """Signed codes in [-8, 7] as bytes of two, in flat order, the earlier one in the low half."""
    flat = np.zeros(codes.size + codes.size % 2, np.uint8)
    flat[: codes.size] = codes.reshape(-1).astype(np.uint8) & 0xF
    return np.bitwise_or(flat[0::2], np.left_shift(flat[1::2], 4), dtype=np.uint8)
