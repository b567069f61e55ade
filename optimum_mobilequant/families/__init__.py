"""Where the layers are in each architecture, as data."""

from .family import Family, Geometry, family_of, geometry_of
from .table import FAMILIES

__all__ = ["FAMILIES", "Family", "Geometry", "family_of", "geometry_of"]
