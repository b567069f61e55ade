"""What every tensor of the integer graph is: its role, its bits, where its encoding comes from."""

from .plan import ActivationSpec, Plan, WeightSpec, build_plan, refuse_formats
from .presets import PRESETS, Scheme, WeightRule

__all__ = ["PRESETS", "ActivationSpec", "Plan", "Scheme", "WeightRule", "WeightSpec", "build_plan", "refuse_formats"]
