"""Presets: the bits of each role. A preset is a table; adding one is adding a row to PRESETS.

Source: MobileQuant (Tan et al., EMNLP 2024), section 4.1 and appendix; the rows that paper leaves in float (residual
adds, scores, embedding output, final norm, logits) are filled with 16 bits so that the graph is integer only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..lookup import unknown_name

GROUPS = {"group32": 32, "group64": 64, "group128": 128}
GRANULARITIES = ("channel", "tensor", *GROUPS)


@dataclass(frozen=True)
class WeightRule:
    """How the weights of one role are stored.

    Args:
        granularity: of the scale of an integer grid: ``"channel"`` (one for each output row), ``"tensor"``, or
            ``"group128"`` and the like: rows with a whole multiplier for each 128 columns (``numerics.groups``), 4
            bits and symmetric.
        format: ``"int"``, a grid of integers; or a storage format of ``nn.formats.FORMATS``, which no integer graph
            takes and for which ``symmetric`` and ``granularity`` mean nothing.
        span: columns of a row that share a range, in a storage format.
        outliers: share of each row that ``"adpq"`` keeps apart.
    """

    bits: int
    symmetric: bool = True
    granularity: str = "channel"
    format: str = "int"
    span: int = 0
    outliers: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON; what only storage formats have is left out of a grid of integers."""
        values = asdict(self)
        return values if self.format != "int" else {k: values[k] for k in ("bits", "symmetric", "granularity")}

    @property
    def group(self) -> int | None:
        """Columns of a group, or None."""
        return GROUPS.get(self.granularity)


# Roles of activations, in the order of the data flow.
BASE_ACTIVATIONS: dict[str, int] = {
    "embedding": 16,
    "rope_table": 16,  # cos and sin, fixed int16 Q1.14
    "residual": 16,
    "norm": 8,
    "query_raw": 16,  # input of a q/k norm, where the family has one
    "key_raw": 16,
    "query": 16,  # before the rotary embedding; rounding to 8 bits before and after it costs twice
    "key": 16,
    "value": 8,
    "query_rotated": 8,
    "key_rotated": 8,
    "scores": 16,
    "probabilities": 16,  # fixed [0, 1]
    "context": 8,
    "attention_out": 16,
    "gate": 8,
    "activation": 8,
    "up": 8,
    "product": 8,
    "mlp_out": 16,
    "final_norm": 16,
    "logits": 16,
}

_LINEAR_ROLES = ("attention", "gate", "up", "down")


@dataclass(frozen=True)
class Scheme:
    """Resolved bits of every role, as stored in a checkpoint.

    Args:
        weights: role -> rule, for the roles attention, gate, up, down, head, embedding, gain.
        activations: role -> bits (8 or 16), for every role of ``BASE_ACTIVATIONS``.
        summary: one line for people.
    """

    weights: Mapping[str, WeightRule]
    activations: Mapping[str, int]
    summary: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` stores it."""
        return {
            "weights": {role: rule.to_dict() for role, rule in self.weights.items()},
            "activations": dict(self.activations),
            "summary": self.summary,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a role is missing or unknown, or bits are not supported (a damaged or foreign config).
        """
        weights = {role: WeightRule(**rule) for role, rule in data["weights"].items()}
        activations = {role: int(bits) for role, bits in data["activations"].items()}
        for name, given, known in (
            ("weights", set(weights), {*_LINEAR_ROLES, "head", "embedding", "gain"}),
            ("activations", set(activations), set(BASE_ACTIVATIONS)),
        ):
            if given != known:
                raise ValueError(
                    f"the scheme's {name} do not fit this version: missing {sorted(known - given)}, "
                    f"unknown {sorted(given - known)}"
                )
        if bad := {role: bits for role, bits in activations.items() if bits not in (8, 16)}:
            raise ValueError(f"activation bits must be 8 or 16, not {bad}")
        if bad_rules := {role: rule for role, rule in weights.items() if rule.bits not in (3, 4, 8, 16)}:
            raise ValueError(f"weight bits must be 3, 4, 8 or 16, not {bad_rules}")
        if bad_rules := {role: rule for role, rule in weights.items() if rule.granularity not in GRANULARITIES}:
            raise ValueError(f"weight granularity must be one of {GRANULARITIES}, not {bad_rules}")
        for role, rule in weights.items():
            check_format(role, rule)
        return cls(weights, activations, data.get("summary", ""))


# Bits of each storage format, and the roles that can have one.
FORMAT_BITS = {"e0m4": (4,), "adpq": (3, 4)}
_FORMAT_ROLES = _LINEAR_ROLES


def check_format(name: str, rule: WeightRule) -> None:
    """Refuse a rule whose format does not exist, or not at its bits.

    Raises:
        ValueError: names the weight or role.
    """
    if rule.format == "int":
        return
    if rule.format not in FORMAT_BITS:
        raise ValueError(unknown_name("weight format", rule.format, ("int", *FORMAT_BITS)))
    if rule.bits not in (known := FORMAT_BITS[rule.format]):
        raise ValueError(
            f"{name}: the weight format {rule.format} has {' or '.join(map(str, known))} bits, not {rule.bits}; use "
            'preset="w4a8" or "w4a16", or override these weights with {"weight_format": "int"} beside their bits'
        )
    if rule.span < 1 or not 0 <= rule.outliers < 1:
        raise ValueError(f"{name}: a storage format needs a span of 1 or more and a share of outliers below 1")


def with_format(scheme: Scheme, name: str, *, span: int, outliers: float) -> Scheme:
    """The scheme with its projections in a storage format.

    Raises:
        ValueError: the format has none of the scheme's bits.
    """
    weights = dict(scheme.weights)
    for role in _FORMAT_ROLES:
        share = outliers if name == "adpq" else 0.0
        weights[role] = replace(
            weights[role], symmetric=True, granularity="channel", format=name, span=span, outliers=share
        )
        check_format(role, weights[role])
    return replace(scheme, weights=weights)


def _scheme(
    rule: WeightRule, summary: str, activations: Mapping[str, int] | None = None, **roles: WeightRule
) -> Scheme:
    weights = dict.fromkeys(_LINEAR_ROLES, rule)
    # The table is read by row and the head by row: 8 bits each, whatever the layers use. Gains are 16-bit constants.
    weights |= {"head": WeightRule(8), "embedding": WeightRule(8), "gain": WeightRule(16, granularity="tensor")}
    return Scheme(weights | roles, BASE_ACTIVATIONS | dict(activations or {}), summary)


# The second operand of an activation x activation matmul stays at 8 bits: that is what the hardware multiplies.
_ALL_16 = dict.fromkeys(BASE_ACTIVATIONS, 16) | {"key_rotated": 8, "value": 8}
# The published simulation rounds queries and keys to 8 bits on both sides of the rotary embedding.
_AS_PUBLISHED = {"query": 8, "key": 8}
_ALL_8 = dict.fromkeys(BASE_ACTIVATIONS, 8) | {"rope_table": 16}

PRESETS: dict[str, Scheme] = {
    "w8a8": _scheme(WeightRule(8), "8-bit weights, 8-bit activations, 16-bit residual and softmax"),
    "w4a8": _scheme(WeightRule(4), "4-bit symmetric per-channel weights, activations as w8a8 (the deployable form)"),
    "w4a8-g128": _scheme(
        WeightRule(4, granularity="group128"), "as w4a8, with a whole multiplier of the scale for each 128 weights"
    ),
    "w4a8-asym": _scheme(
        WeightRule(4, symmetric=False), "4-bit asymmetric per-channel weights, as in the paper", _AS_PUBLISHED
    ),
    "w8a8-paper": _scheme(
        WeightRule(8, symmetric=False, granularity="tensor"),
        "8-bit asymmetric per-tensor weights (down per channel), as in the paper",
        _AS_PUBLISHED,
        down=WeightRule(8, symmetric=False),
    ),
    "w8a16": _scheme(WeightRule(8), "8-bit weights, 16-bit activations, 8-bit KV cache", _ALL_16),
    "w4a16": _scheme(WeightRule(4), "4-bit weights, 16-bit activations, 8-bit KV cache", _ALL_16),
    "w8a8-full": _scheme(WeightRule(8), "8-bit weights, every activation 8-bit", _ALL_8),
}
