"""What a chip computes: op-precision rules and names of systems on chip, as data, and the checks that read them."""

from .check import Findings, check_graph, check_plan, findings
from .qnn_htp import QNN_HTP
from .rules import Rule, Soc, Target
from .widen import widen_graph

# Adding a target is adding a row.
TARGETS: dict[str, Target] = {target.name: target for target in (QNN_HTP,)}

__all__ = [
    "TARGETS",
    "Findings",
    "Rule",
    "Soc",
    "Target",
    "check_graph",
    "check_plan",
    "findings",
    "soc_of",
    "widen_graph",
]


def soc_of(name: str, target: Target = QNN_HTP) -> Soc:
    """A system on chip by its name.

    Args:
        name: in any case, such as ``"sm8650"``. target: whose chips.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    from ...lookup import lookup

    return lookup("soc", target.socs, name.lower())
