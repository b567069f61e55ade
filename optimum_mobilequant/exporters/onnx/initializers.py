"""Constants of an ONNX graph: weights as codes or as floats, scales and zero points, shapes."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from ...graph import Encoding, Graph
from ...numerics import dequantize
from .store import Array, WeightStore
from .types import CODE_TYPES, code_array


class Initializers:
    """Those of one ONNX graph; weights and encodings are written once to the store that all graphs share.

    Attributes:
        protos: by name, in the order in which they were asked for.
    """

    def __init__(self, graph: Graph, store: WeightStore):
        self.graph, self.store = graph, store
        self.protos: dict[str, onnx.TensorProto] = {}

    def codes(self, name: str, *, transposed: bool = False, steps: int = 1) -> str:
        """Integers of a constant of the integer graph, which must have an encoding; returns their name.

        Args:
            transposed: a matrix as (in, out).
            steps: each step of a bias as so many finer ones.

        Raises:
            ValueError: a bias too large for finer steps.
        """
        stored = self.graph.values[name].encoding
        assert stored is not None

        def values() -> tuple[int, Array]:
            codes = self.graph.constants[name]()
            if steps != 1:
                codes = codes.to(torch.int64) * steps
                if int(codes.abs().max()) > stored.grid.qmax:
                    raise ValueError(
                        f"{name} does not fit in 32 bits beside a 16-bit output: give input and output of its linear "
                        "equal bits (overrides)"
                    )
            return code_array(codes.T if transposed else codes, stored)

        return self._shared(f"{name}.codes" if steps == 1 else f"{name}.wide.codes", values)

    def floats(self, name: str, *, transposed: bool = False) -> str:
        """float32 values of a constant of the integer graph, under its own name."""
        stored = self.graph.values[name].encoding

        def values() -> tuple[int, Array]:
            held = self.graph.constants[name]()
            if stored is not None:
                held = dequantize(held, *stored.broadcast(held.ndim))
            return TensorProto.FLOAT, (held.float().T if transposed else held.float()).numpy()

        return self._shared(name, values)

    def parameters(self, name: str, encoding: Encoding) -> list[str]:
        """Scale, and zero point, whose type is that of the codes; int32 goes without one. Returns their names."""
        kind, dtype = CODE_TYPES[encoding.grid.bits, encoding.grid.signed]
        made = [self._shared(f"{name}.scale", lambda: (TensorProto.FLOAT, _blocks_first(encoding.scale)))]
        if encoding.grid.bits < 32:
            zero_point = _blocks_first(encoding.zero_point).astype(dtype)
            made.append(self._shared(f"{name}.zero_point", lambda: (kind, zero_point)))
        return made

    def small(self, name: str, values: Array) -> str:
        """A constant of this graph alone, such as a shape."""
        self.protos[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def _shared(self, name: str, make: Callable[[], tuple[int, Array]]) -> str:
        if name not in self.protos:
            self.protos[name] = self.store.tensor(name, make)
        return name


def _blocks_first(parameter: Tensor) -> Array:
    """Block scales [out, blocks] turned as the weights of a matrix product are, (in, out); others as they are."""
    turned: Array = (parameter.T if parameter.ndim == 2 else parameter).numpy()
    return turned
