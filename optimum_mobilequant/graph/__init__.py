"""The integer graph: one description that the executor, the exporters and the memory plan read."""

from .build import build_graph
from .ir import KINDS, MOVES, Encoding, Graph, Op, Value
from .load import LoadedGraph, load_graph, method_of

__all__ = [
    "KINDS",
    "MOVES",
    "Encoding",
    "Graph",
    "LoadedGraph",
    "Op",
    "Value",
    "build_graph",
    "load_graph",
    "method_of",
]
