"""What a run is told: the config, its options, recipes and efforts, and the settings they come to."""

from .config import MobileQuantConfig

__all__ = ["MobileQuantConfig"]
