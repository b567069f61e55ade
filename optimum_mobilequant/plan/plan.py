"""The plan: every tensor of the integer graph with its role, bits and encoding, from family and scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from ..families import Family, Geometry
from ..numerics import Grid
from .presets import Scheme, WeightRule, check_format


@dataclass(frozen=True)
class ActivationSpec:
    """One statically quantized activation, named after the quantizer module that holds its encoding.

    Args:
        name: dotted path of the quantizer, e.g. ``model.layers.0.mlp.up_proj.output``.
        role: key of ``presets.BASE_ACTIVATIONS``.
        bits: 8 or 16.
        fixed: (scale, zero_point) known in advance and never learned, or None.
        signed: two's complement grid (rotary tables only).
    """

    name: str
    role: str
    bits: int
    fixed: tuple[float, int] | None = None
    signed: bool = False

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.signed)


@dataclass(frozen=True)
class WeightSpec:
    """One constant tensor: ``role`` is a key of the scheme's weights, or ``"bias"`` (32 bits on the device)."""

    name: str
    role: str
    rule: WeightRule

    @property
    def grid(self) -> Grid:
        return Grid(self.rule.bits, signed=True)

    @property
    def per_channel(self) -> bool:
        """Whether each row has a scale of its own."""
        return self.rule.granularity != "tensor"

    @property
    def code_grid(self) -> Grid:
        """Grid of the integers that a row's scale multiplies: with groups, 8 bits hold code times multiplier."""
        return Grid(8, signed=True) if self.rule.group else self.grid


@dataclass(frozen=True)
class Plan:
    """All tensors of a model.

    Args:
        activations: quantizer name -> spec, in the order of the data flow.
        weights: name of the module that owns the weight -> spec.
        moves: tensors that only move data -> the activation (or the int32 accumulator) whose encoding they carry.
        prefix: ids of the tokens whose keys and values stand in the cache before every text.
        key_shift: a constant is added to the rotated keys of each layer (``nn.shift``).
    """

    family: Family
    geometry: Geometry
    activations: Mapping[str, ActivationSpec]
    weights: Mapping[str, WeightSpec]
    moves: Mapping[str, str]
    prefix: tuple[int, ...] = ()
    key_shift: bool = False


def refuse_formats(plan: Plan) -> None:
    """Refuse weights that are no integers on a grid, for whatever computes with integers.

    Raises:
        ValueError: names them and the fix.
    """
    found = {name: spec.rule.format for name, spec in plan.weights.items() if spec.rule.format != "int"}
    if found:
        names = [*found][:3] + ([f"{len(found) - 3} more"] if len(found) > 3 else [])
        raise ValueError(
            f"{', '.join(names)} are stored as {' and '.join(sorted(set(found.values())))}, a format for CPU and GPU "
            'that no integer graph, NPU or export computes with: quantize again with weight_format="int" '
            '(recipe="adpq" is the part of AdpQ that integers can have)'
        )


def build_plan(
    family: Family,
    geometry: Geometry,
    scheme: Scheme,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    prefix: Sequence[int] = (),
    *,
    key_shift: bool = False,
) -> Plan:
    """Lay the scheme over the architecture, then apply the overrides.

    Args:
        overrides: fnmatch pattern of a module or tensor name -> ``{"bits": 8|16}`` for activations and
            ``{"weight_bits", "weight_symmetric", "weight_granularity"}`` for weights; later patterns win.
        prefix: ids of the prefix tokens. key_shift: whether rotated keys get a constant.

    Raises:
        ValueError: a pattern matches nothing, or changes a tensor that cannot be changed, or tells a tied head apart
            from the embedding whose table it reads.
    """
    activations: dict[str, ActivationSpec] = {}
    weights: dict[str, WeightSpec] = {}
    moves: dict[str, str] = {}

    def act(name: str, role: str, **more: Any) -> str:
        activations[name] = ActivationSpec(name, role, scheme.activations[role], **more)
        return name

    def weight(name: str, role: str) -> None:
        weights[name] = WeightSpec(name, role, scheme.weights[role])

    f = family
    weight(f.embedding, "embedding")
    residual = act(f"{f.embedding}.output", "embedding")
    act(f"{f.rotary}.output", "rope_table", fixed=(2.0**-14, 0), signed=True)
    for i in range(geometry.layers):
        p, attn, mlp = f.layer(i), f.layer(i, f.attention), f.layer(i, f.down.rpartition(".")[0])
        q, k, v, o = (f.layer(i, part) for part in (f.query, f.key, f.value, f.out))
        gate, up, down = (f.layer(i, part) for part in (f.gate, f.up, f.down))
        for name, role in ((q, "attention"), (k, "attention"), (v, "attention"), (o, "attention")):
            weight(name, role)
        for name, role in ((gate, "gate"), (up, "up"), (down, "down")):
            weight(name, role)
        input_norm, mlp_norm = f.layer(i, f.input_norm), f.layer(i, f.mlp_norm)
        weight(input_norm, "gain")
        weight(mlp_norm, "gain")

        moves[f"{input_norm}.input"] = residual
        normed = act(f"{input_norm}.output", "norm")
        moves |= {f"{name}.input": normed for name in (q, k, v)}
        for name, role, norm in ((q, "query", f.query_norm), (k, "key", f.key_norm)):
            act(f"{name}.output", f"{role}_raw" if norm else role)
            if norm:
                weight(f"{attn}.{norm}", "gain")
                moves[f"{attn}.{norm}.input"] = f"{name}.output"
                act(f"{attn}.{norm}.output", role)
        act(f"{v}.output", "value")
        act(f"{attn}.query_rotated", "query_rotated")
        act(f"{attn}.key_rotated", "key_rotated")
        moves[f"{attn}.rotary_products"] = "int32 accumulator of the rotation"
        moves[f"{attn}.key_cache"] = f"{attn}.key_rotated"
        moves[f"{attn}.value_cache"] = f"{v}.output"
        moves[f"{attn}.key_repeated"] = f"{attn}.key_rotated"
        moves[f"{attn}.value_repeated"] = f"{v}.output"
        act(f"{attn}.scores", "scores")
        moves[f"{attn}.masked_scores"] = f"{attn}.scores"
        bits = scheme.activations["probabilities"]
        act(f"{attn}.probabilities", "probabilities", fixed=(1.0 / (2**bits - 1), 0))
        context = act(f"{attn}.context", "context")
        moves[f"{o}.input"] = context
        act(f"{o}.output", "attention_out")

        middle = act(f"{mlp_norm}.input", "residual")
        moves[f"{p}.attention_residual"] = middle
        normed = act(f"{mlp_norm}.output", "norm")
        moves |= {f"{name}.input": normed for name in (gate, up)}
        act(f"{gate}.output", "gate")
        act(f"{f.layer(i, f.activation)}.output", "activation")
        act(f"{up}.output", "up")
        product = act(f"{down}.input", "product")
        moves[f"{mlp}.product"] = product
        act(f"{down}.output", "mlp_out")
        residual = act(f"{p}.output", "residual")

    weight(f.final_norm, "gain")
    moves[f"{f.final_norm}.input"] = residual
    normed = act(f"{f.final_norm}.output", "final_norm")
    weight(f.head, "head")
    moves[f"{f.head}.input"] = normed
    act(f"{f.head}.output", "logits")
    _apply_overrides(activations, weights, overrides or {})
    _refuse_groups(weights)
    if geometry.tied and weights[f.head].rule != weights[f.embedding].rule:
        raise ValueError(
            f"{f.head} reads the table of {f.embedding} (tied weights), so the two cannot differ: "
            f"override the weights of both alike"
        )
    return Plan(family, geometry, activations, weights, moves, tuple(prefix), key_shift)


def _refuse_groups(weights: Mapping[str, WeightSpec]) -> None:
    """Groups are for 4-bit symmetric projections."""
    for name, spec in weights.items():
        if not spec.rule.group:
            continue
        if spec.role in ("embedding", "head"):
            raise ValueError(
                f"{name} cannot have {spec.rule.granularity}: the embedding table and the head have one scale a row; "
                'name the projections in the override, e.g. "*_proj"'
            )
        if spec.rule.bits != 4 or not spec.rule.symmetric:
            raise ValueError(
                f"{name} has {spec.rule.bits}-bit {'' if spec.rule.symmetric else 'a'}symmetric weights, but "
                f'{spec.rule.granularity} is for 4 bits, symmetric: set "weight_bits": 4, or granularity "channel"'
            )


def _apply_overrides(
    activations: dict[str, ActivationSpec],
    weights: dict[str, WeightSpec],
    overrides: Mapping[str, Mapping[str, Any]],
) -> None:
    for pattern, change in overrides.items():
        hits = 0
        rule_change = {key.removeprefix("weight_"): v for key, v in change.items() if key.startswith("weight_")}
        if rule_change:
            for name in (n for n in weights if fnmatch(n, pattern)):
                if weights[name].role == "gain":
                    continue  # norm gains stay 16-bit constants; a pattern such as "*layers.0.*" must not break them
                weights[name] = replace(weights[name], rule=replace(weights[name].rule, **rule_change))
                check_format(name, weights[name].rule)
                hits += 1
        if "bits" in change:
            for name in (n for n in activations if fnmatch(n, pattern) and activations[n].fixed is None):
                activations[name] = replace(activations[name], bits=change["bits"])
                hits += 1
        if not hits:
            raise ValueError(
                f'override "{pattern}" matches no tensor that {sorted(change)} can change; '
                f"names look like {next(iter(weights))} (weights) and {next(iter(activations))} (activations)"
            )
