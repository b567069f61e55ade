"""Weight-equivalent transforms: log-scales that cancel between a producer and its consumers."""

from .edges import SITES, Edge, Effect, edges_of
from .smooth import smooth_scales

__all__ = ["SITES", "Edge", "Effect", "edges_of", "smooth_scales"]
