"""The integer graph: one description that the executor, the exporters and the memory plan read."""

from .build import build_graph
from .ir import KINDS, MOVES, Encoding, Graph, Op, Value

__all__ = ["KINDS", "MOVES", "Encoding", "Graph", "Op", "Value", "build_graph"]
