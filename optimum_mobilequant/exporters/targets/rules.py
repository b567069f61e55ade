"""The form of a target's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# A fact about an operation: bits (None for 16-bit float), a name, or yes and no.
Fact = int | str | bool | None

ACCEPTED, WIDEN, UNVERIFIED, REFUSED = "accepted", "widen", "unverified", "refused"


@dataclass(frozen=True)
class Rule:
    """What a target does with an operation. The first rule that fits decides; where none fits, it is refused.

    Args:
        kind: of the operation, a key of ``graph.KINDS``, or ``"*"``.
        when: fact (see :func:`~.check.facts_of`) -> the values for which the rule holds; an operation without that
            fact does not fit.
        verdict: ``"accepted"``; ``"widen"``: runs once the operands named by ``widen`` have 16 bits; ``"unverified"``:
            believed to run, not seen to; or ``"refused"``.
        why: the evidence.
        fix: for a refusal, what to change.
        widen: any of ``"input"`` and ``"output"``.
    """

    kind: str
    when: Mapping[str, tuple[Fact, ...]]
    verdict: str = ACCEPTED
    why: str = ""
    fix: str = ""
    widen: tuple[str, ...] = ()

    def fits(self, kind: str, facts: Mapping[str, Fact]) -> bool:
        return self.kind in ("*", kind) and all(
            key in facts and any(facts[key] is v or facts[key] == v for v in values)
            for key, values in self.when.items()
        )


@dataclass(frozen=True)
class Soc:
    """A system on chip.

    Args:
        name: lower case, e.g. ``"sm8650"``.
        soc_model: the number by which QNN knows it.
        htp_arch: version of its Hexagon tensor processor, e.g. 75.
    """

    name: str
    soc_model: int
    htp_arch: int

    @property
    def dsp_arch(self) -> str:
        """As configuration files state the architecture: ``"v75"``."""
        return f"v{self.htp_arch}"


@dataclass(frozen=True)
class Target:
    """A backend that graphs are made for: its rules and its systems on chip, by name."""

    name: str
    summary: str
    rules: tuple[Rule, ...]
    socs: Mapping[str, Soc]
