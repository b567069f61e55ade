"""Weight-equivalent transforms: log-scales that cancel between a producer and its consumers."""

from .adaptive import adaptive_scales
from .edges import SITES, Edge, Effect, edges_of
from .smooth import smooth_scales

__all__ = ["SITES", "Edge", "Effect", "adaptive_scales", "edges_of", "smooth_scales"]
