"""Which operations of a graph, or of a plan, a target refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...log import get_logger
from .rules import REFUSED, UNVERIFIED, WIDEN, Fact, Rule, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...graph import Graph, Op
    from ...plan import Plan

logger = get_logger(__name__)
_UNKNOWN = Rule("*", {}, REFUSED, "not among the combinations that are known to run")


@dataclass(frozen=True)
class Findings:
    """Operations of a graph that need attention, with the rule that says so, in the order of the graph.

    Args:
        refused: the target cannot run them.
        widen: they run once the rule's operands have 16 bits.
        unverified: believed to run, not seen to.
    """

    refused: tuple[tuple[Op, Rule], ...]
    widen: tuple[tuple[Op, Rule], ...]
    unverified: tuple[tuple[Op, Rule], ...]


def facts_of(graph: Graph, op: Op) -> dict[str, Fact]:
    """What rules can ask about an operation.

    ``input``, ``second``, ``output``: bits of the first and second activation and of the result, None for floats.
    ``weight``, ``granularity`` (``"tensor"``, ``"channel"``, ``"block"``), ``symmetric``, ``bias`` (bits, 0 without):
    of constants. ``norm`` (``"rms"``, ``"layer"``) and ``rank`` of a norm; ``function`` of an activation; ``shift``:
    bits of what a rotation adds, 0 if it adds nothing. ``floats``: nothing it reads or makes is an integer.
    """

    def bits(name: str) -> int | None:
        encoding = graph.values[name].encoding
        return None if encoding is None else encoding.grid.bits

    facts: dict[str, Fact] = {"output": bits(op.output)}
    coded = [name for name in op.inputs if name not in ("input_ids", "attention_mask")]
    activations = [name for name in coded if name not in graph.constants]
    facts |= {key: bits(name) for key, name in zip(("input", "second"), activations, strict=False)}
    if op.kind == "rope":
        facts["shift"] = bits(op.inputs[3]) if len(op.inputs) > 3 else 0
    elif constants := [name for name in coded if name in graph.constants]:
        facts |= {"weight": bits(constants[0]), "bias": bits(constants[1]) if len(constants) > 1 else 0}
        encoding = graph.values[constants[0]].encoding
        if encoding is not None:
            kind = "block" if encoding.per_block else "channel" if encoding.per_channel else "tensor"
            facts |= {"granularity": kind, "symmetric": not bool(encoding.zero_point.any())}
    if op.kind == "norm":
        facts["norm"] = "layer" if op.attributes["centre"] else "rms"
        facts["rank"] = len(graph.values[op.output].shape)
    if op.kind == "activation":
        facts["function"] = str(op.attributes["function"])
    facts["floats"] = all(bits(name) is None for name in (*coded, op.output))
    return facts


def findings(graph: Graph, target: Target) -> Findings:
    """What the target says about each operation of a graph."""
    found: dict[str, list[tuple[Op, Rule]]] = {REFUSED: [], WIDEN: [], UNVERIFIED: []}
    for op in graph.ops:
        facts = facts_of(graph, op)
        rule = next((rule for rule in target.rules if rule.fits(op.kind, facts)), _UNKNOWN)
        found.get(rule.verdict, []).append((op, rule))
    return Findings(*(tuple(found[verdict]) for verdict in (REFUSED, WIDEN, UNVERIFIED)))


def check_graph(graph: Graph, target: Target) -> Findings:
    """Refuse a graph that the target cannot run; what is believed but not seen to run is a warning.

    Raises:
        ValueError: lists every kind of refused operation, the reason, and what to change.
    """
    found = findings(graph, target)
    if found.refused:
        lines = "\n".join(f"- {line}" for line in _grouped(graph, found.refused))
        raise ValueError(f"{target.name} cannot run {len(found.refused)} operations:\n{lines}")
    for line in _grouped(graph, found.unverified):
        logger.warning(f"{target.name}, not verified: {line}")
    return found


def check_plan(model: PreTrainedModel, plan: Plan, target: Target) -> Findings:
    """:func:`check_graph` for a float model that is yet to be quantized by a plan."""
    from ...graph import build_graph
    from .planned import PlannedTensors

    return check_graph(build_graph(model, plan, PlannedTensors(model, plan)), target)


def _grouped(graph: Graph, entries: Iterable[tuple[Op, Rule]]) -> list[str]:
    """One line for the operations of one rule; where no rule is, one for operations alike."""
    groups: dict[tuple[int, str], list[tuple[Op, Rule]]] = {}
    for op, rule in entries:
        like = _described(op.kind, facts_of(graph, op)) if rule is _UNKNOWN else ""
        groups.setdefault((id(rule), like), []).append((op, rule))
    lines = []
    for members in groups.values():
        (op, rule), more = members[0], f" and {len(members) - 1} more" if len(members) > 1 else ""
        fix = f"; {rule.fix}" if rule.fix else ""
        lines.append(f"{op.name}{more} ({_described(op.kind, facts_of(graph, op))}): {rule.why}{fix}")
    return lines


def _described(kind: str, facts: Mapping[str, Any]) -> str:
    def width(bits: int | None) -> str:
        return "float" if bits is None else f"{bits}-bit"

    parts = [f"{width(facts['input'])} input"] if "input" in facts else []
    parts += [f"{width(facts['second'])} second operand"] if "second" in facts else []
    if "weight" in facts:
        symmetry = "" if facts.get("symmetric", True) else "asymmetric "
        parts.append(f"{width(facts['weight'])} {symmetry}weights for each {facts.get('granularity', 'tensor')}")
    parts += [f"{width(facts['shift'])} shift"] if facts.get("shift") else []
    parts.append(f"{width(facts['output'])} output")
    return f"{facts.get('function', kind)} with {', '.join(parts)}"
