"""Statistics of activations on calibration text, and the static ranges chosen from them."""

from .collect import Statistics, collect
from .massive import Outliers, find_outliers
from .prefix import FoundPrefix, find_prefix
from .ranges import choose_ranges

__all__ = ["FoundPrefix", "Outliers", "Statistics", "choose_ranges", "collect", "find_outliers", "find_prefix"]
