"""Statistics of activations on calibration text, and the static ranges chosen from them."""

from .collect import Statistics, collect
from .ranges import choose_ranges

__all__ = ["Statistics", "choose_ranges", "collect"]
