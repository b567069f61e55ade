"""Weight-equivalent transforms: log-scales and matrices that cancel between a producer and its consumers."""

from .adaptive import adaptive_scales
from .edges import SITES, Edge, Effect, edges_of
from .matrices import MATRIX_SITES, ROTATIONS, MatrixEdge, MatrixEffect, matrix_edges_of, refuse_unmergeable
from .signs import SIGN_SITES, Turn, turn
from .smooth import smooth_scales

__all__ = [
    "MATRIX_SITES",
    "ROTATIONS",
    "SIGN_SITES",
    "SITES",
    "Edge",
    "Effect",
    "MatrixEdge",
    "MatrixEffect",
    "Turn",
    "adaptive_scales",
    "edges_of",
    "matrix_edges_of",
    "refuse_unmergeable",
    "smooth_scales",
    "turn",
]
