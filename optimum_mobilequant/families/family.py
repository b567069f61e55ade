"""Family: the names of the roles' modules in one architecture, and the geometry read from a model of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """Where the parts of a pre-norm decoder are. Defaults are Llama's names; an entry states what differs.

    Args:
        name: short name, the value of ``MobileQuantConfig(family=...)``.
        model_types: ``config.model_type`` values it serves.
        layers, embedding, final_norm, rotary, head: dotted paths from the causal-LM model.
        input_norm, mlp_norm, attention, query, key, value, out, gate, up, down: paths from one decoder layer.
        query_norm, key_norm: names inside the attention of norms between projection and rotary embedding, or None.
        activation: path from one decoder layer of the activation module.
        norm_kind: ``"rms"`` or ``"layer"``.
        gain_offset: constant added to the stored norm gain (Gemma: 1.0).
        bias_flags: config flags that give projections a bias -> the roles of those that get one.
        unsupported: config flags that must be false, with what they mean.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    norm_kind: str = "rms"
    gain_offset: float = 0.0
    bias_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)

    def layer(self, index: int, part: str | None = None) -> str:
        """Dotted path of a decoder layer, or of a part of it (``part`` is a path inside the layer)."""
        return f"{self.layers}.{index}" + (f".{part}" if part else "")


@dataclass(frozen=True)
class Geometry:
    """Sizes that the equivalent transforms need, read from the model's modules rather than trusted from its config.

    Args:
        layers, heads, kv_heads, hidden, mlp, vocabulary: counts and widths.
        head_dim: width of a head. rotary_dims: how many of its leading dims rotate, in pairs
            ``(i, i + rotary_dims // 2)``.
        tied: the head reads the embedding's table.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dims: int
    hidden: int
    mlp: int
    vocabulary: int
    tied: bool

    @property
    def groups(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads


def family_of(model: nn.Module, name: str | None = None) -> Family:
    """The family that serves ``model``.

    Args:
        model: a transformers causal LM.
        name: force this family instead of looking up ``model.config.model_type``.

    Raises:
        ValueError: no family fits, with a filled-in entry to add; or the model uses an option the family lacks.
    """
    from .table import FAMILIES

    model_type = getattr(model.config, "model_type", "?")
    for family in FAMILIES:
        if family.name == name or (name is None and model_type in family.model_types):
            break
    else:
        known = ", ".join(f.name for f in FAMILIES)
        if name is not None:
            raise ValueError(f'family "{name}" is unknown; known: {known}')
        raise ValueError(
            f'no family serves model_type "{model_type}" (known: {known}). If it is a pre-norm decoder with a gated '
            f"MLP and rotary embeddings, add this entry to optimum_mobilequant/families/table.py, checking each "
            f"line:\n\n"
            f"{suggest_entry(model)}"
        )
    for flag, meaning in family.unsupported.items():
        if getattr(model.config, flag, False):
            raise ValueError(f"{family.name} with {flag}=True ({meaning}) is not supported")
    missing = [path for path in _paths(family) if not _has(model, path)]
    if family.head in missing and getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head ({family.head}); load the model with "
            "AutoModelForCausalLM"
        )
    if missing:
        raise ValueError(
            f'family "{family.name}" expects modules that this model lacks: {", ".join(missing)}. Filled-in entry '
            f"from the model's own modules:\n\n{suggest_entry(model)}"
        )
    return family


def geometry_of(model: nn.Module, family: Family) -> Geometry:
    """Read the sizes from the modules.

    Args:
        model: a transformers causal LM. family: the one that serves it.

    Raises:
        ValueError: config and modules disagree.
    """
    config: Any = model.config
    layers = len(list(model.get_submodule(family.layers).children()))
    attention: Any = model.get_submodule(family.layer(0, family.attention))
    head_dim = int(attention.head_dim)
    query, key = (_linear_shape(model, family.layer(0, part)) for part in (family.query, family.key))
    if query[0] % head_dim or key[0] % head_dim or (query[0] // head_dim) % (key[0] // head_dim):
        raise ValueError(f"projection rows {query[0]}, {key[0]} do not divide into heads of {head_dim}")
    inv_freq: Any = getattr(model.get_submodule(family.rotary), "inv_freq", None)
    rotary_dims = 2 * inv_freq.shape[-1] if inv_freq is not None else head_dim
    return Geometry(
        layers=layers,
        heads=query[0] // head_dim,
        kv_heads=key[0] // head_dim,
        head_dim=head_dim,
        rotary_dims=rotary_dims,
        hidden=query[1],
        mlp=_linear_shape(model, family.layer(0, family.up))[0],
        vocabulary=_linear_shape(model, family.head)[0],
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def _linear_shape(model: nn.Module, path: str) -> tuple[int, int]:
    linear: Any = model.get_submodule(path)
    return int(linear.out_features), int(linear.in_features)


def _paths(family: Family) -> Iterator[str]:
    yield from (family.layers, family.embedding, family.final_norm, family.rotary, family.head)
    inside = (
        "input_norm",
        "mlp_norm",
        "attention",
        "query",
        "key",
        "value",
        "out",
        "gate",
        "up",
        "down",
        "activation",
    )
    for part in inside:
        yield family.layer(0, getattr(family, part))
    for norm in (family.query_norm, family.key_norm):
        if norm is not None:
            yield family.layer(0, f"{family.attention}.{norm}")


def _has(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


# Substrings by which modules of other architectures are usually named, most telling first.
_GUESSES: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_layernorm", "ln_1", "attention_norm", "norm1", "input_norm"),
    "mlp_norm": ("post_attention_layernorm", "ln_2", "ffn_norm", "norm2", "pre_feedforward"),
    "query": ("q_proj", "wq", "query"),
    "key": ("k_proj", "wk", "key"),
    "value": ("v_proj", "wv", "value"),
    "out": ("o_proj", "wo", "out_proj", "dense"),
    "gate": ("gate_proj", "w1", "gate"),
    "up": ("up_proj", "w3", "fc1", "up"),
    "down": ("down_proj", "w2", "fc2", "down"),
    "activation": ("act_fn", "activation_fn", "act"),
}


def suggest_entry(model: nn.Module) -> str:
    """A ``Family(...)`` entry for an unknown architecture, derived from the model's own modules.

    Roles that no module name resembles are marked, so that the reader sees what is left to decide.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    layers = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()), default="model.layers")
    layer = lists[layers][0] if lists else nn.Module()
    inside = [n for n, _ in layer.named_modules() if n]
    outside = [n for n, _ in model.named_modules() if n and not n.startswith(layers)]
    defaults = {f.name: f.default for f in fields(Family)}
    model_type = str(getattr(model.config, "model_type", "new"))
    found: dict[str, Any] = {"layers": layers}

    def pick(role: str, names: list[str], hints: tuple[str, ...]) -> None:
        last = {n: n.rpartition(".")[2] for n in names if "qkv" not in n}
        exact = next((n for h in hints for n in last if last[n] == h), None)
        found[role] = exact or next((n for h in hints for n in last if h in last[n]), None)

    for role, hints in _GUESSES.items():
        pick(role, inside, hints)
    if found["query"]:
        found["attention"] = found["query"].rpartition(".")[0]
    chosen = [found[role] for role in _GUESSES]
    for role in _GUESSES:  # fused projections have no module of their own
        found[role] = found[role] if chosen.count(found[role]) == 1 else None
    embedding = next((n for n, m in model.named_modules() if isinstance(m, nn.Embedding)), None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found["embedding"] = embedding
    found["head"] = next((n for n, m in model.named_modules() if m is head and head is not None), None)
    pick("final_norm", outside, ("norm", "ln_f", "final_layernorm", "final_norm"))
    pick("rotary", outside, ("rotary_emb", "rotary"))
    norm = layer.get_submodule(found["input_norm"]) if found["input_norm"] else None
    if isinstance(norm, nn.LayerNorm):
        found["norm_kind"] = "layer"
    elif norm is not None and _has_zero_centred_gain(norm):
        found["gain_offset"] = 1.0
    for role, hint in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        if any(n.endswith(f".{hint}") for n in inside):
            found[role] = hint

    lines = [f'Family("{model_type}", model_types=("{model_type}",),']
    for role, value in found.items():
        if value is None:
            lines.append(f"    {role}=...,  # no module of its own: the role is fused with another or does not exist")
        elif value != defaults.get(role):
            lines.append(f"    {role}={value!r},")
    return "\n".join(lines) + "\n),"


def _has_zero_centred_gain(norm: nn.Module) -> bool:
    """True if the norm multiplies by (1 + weight): probed on its own forward with a zero gain."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.device.type == "meta":
        return False
    with torch.no_grad():
        kept = weight.detach().clone()
        weight.zero_()
        out = norm(torch.ones(1, weight.numel(), dtype=weight.dtype, device=weight.device))
        weight.copy_(kept)
    return bool(out.abs().sum() > 0)
