"""Where the layers are in each architecture, as data."""

from .cache import cache_name
from .family import Family, Geometry, family_of, geometry_of
from .table import FAMILIES

__all__ = ["FAMILIES", "Family", "Geometry", "cache_name", "family_of", "geometry_of"]
