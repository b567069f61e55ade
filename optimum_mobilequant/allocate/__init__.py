"""Bits of each layer under a budget: how much a layer matters, and who gets more bits for the same bytes."""

from .budget import Budget, Unit, parse_budget
from .sensitivity import MEASURES
from .solve import allocate, smallest
from .stage import allocate_bits

__all__ = ["MEASURES", "Budget", "Unit", "allocate", "allocate_bits", "parse_budget", "smallest"]
