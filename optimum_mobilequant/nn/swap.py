"""Replace a model's modules by their quantized counterparts, in place, following a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..plan import Plan
from . import attention
from .formats import FormatWeight
from .modules import QuantActivation, QuantEmbedding, QuantLinear, QuantNorm, Weight
from .prefix import Prefix, hang_prefix
from .quantizer import Quantizer, quantize_output
from .qweight import QWeight
from .shift import KeyShift
from .tunable import TunableBias, TunableWeight

MakeWeight = Callable[[str, Tensor], Weight]
MakeBias = Callable[[str, Tensor], "nn.Parameter | TunableBias"]
MakePrefix = Callable[[str], Prefix]
MakeShift = Callable[[str], KeyShift]


def swap(
    model: nn.Module,
    plan: Plan,
    make_weight: MakeWeight,
    make_bias: MakeBias,
    make_prefix: MakePrefix | None = None,
    make_shift: MakeShift | None = None,
) -> None:
    """Put a quantizer on every activation of the plan and a weight provider on every weight.

    Args:
        model: a transformers causal LM of ``plan.family``; its decoder is changed in place.
        make_weight: (module path, float weight) -> provider. make_bias: likewise for ``<module>.bias``.
        make_prefix: attention path -> its prefix; needed where the plan has one.
        make_shift: attention path -> the constant added to its keys, where the plan has one and it is known by now.

    Raises:
        RuntimeError: the plan and the model do not cover each other.
    """
    f, geometry = plan.family, plan.geometry
    device = model.get_parameter(f"{f.final_norm}.weight").device
    made: set[str] = set()

    def quantizer(name: str) -> Quantizer:
        made.add(name)
        return Quantizer(plan.activations[name], device)

    def optional(name: str) -> Quantizer | None:
        return quantizer(name) if name in plan.activations else None

    def bias_of(path: str, module: nn.Module) -> nn.Parameter | TunableBias | None:
        bias = getattr(module, "bias", None)
        return None if bias is None else make_bias(path, bias)

    def norm(path: str) -> None:
        old: Any = model.get_submodule(path)
        new = QuantNorm(
            make_weight(path, old.weight),
            bias_of(path, old),
            quantizer(f"{path}.output"),
            eps=norm_eps(old),
            centre=f.norm_kind == "layer",
            input=optional(f"{path}.input"),
        )
        model.set_submodule(path, new)

    def linear(path: str, tied: QuantEmbedding | None = None) -> None:
        old: Any = model.get_submodule(path)
        new = QuantLinear(
            None if tied is not None else make_weight(path, old.weight),
            bias_of(path, old),
            quantizer(f"{path}.output"),
            input=optional(f"{path}.input"),
            tied=tied,
        )
        model.set_submodule(path, new)

    old: Any = model.get_submodule(f.embedding)
    embedding = QuantEmbedding(
        make_weight(f.embedding, old.weight),
        quantizer(f"{f.embedding}.output"),
        multiplier=float(getattr(old, "scalar_embed_scale", 1.0)),
        padding_idx=old.padding_idx,
        dtype=old.weight.dtype,
        device=device,
    )
    model.set_submodule(f.embedding, embedding)
    rotary: Any = model.get_submodule(f.rotary)
    rotary.output = quantizer(f"{f.rotary}.output")
    rotary.register_forward_hook(quantize_output)
    for i in range(geometry.layers):
        for part in (f.query, f.key, f.value, f.out, f.gate, f.up, f.down):
            linear(f.layer(i, part))
        norms = [f.layer(i, f.input_norm), f.layer(i, f.mlp_norm)]
        norms += [f"{f.layer(i, f.attention)}.{name}" for name in (f.query_norm, f.key_norm) if name]
        for path in norms:
            norm(path)
        path = f.layer(i, f.activation)
        model.set_submodule(path, QuantActivation(model.get_submodule(path), quantizer(f"{path}.output")))
        attn: Any = model.get_submodule(f.layer(i, f.attention))
        for name in ("query_rotated", "key_rotated", "scores", "probabilities", "context"):
            setattr(attn, name, quantizer(f"{f.layer(i, f.attention)}.{name}"))
        attn.register_forward_pre_hook(attention.check_call, with_kwargs=True)
        layer: Any = model.get_submodule(f.layer(i))
        layer.output = quantizer(f"{f.layer(i)}.output")
        layer.register_forward_hook(quantize_output)
        if plan.key_shift and make_shift is not None:
            attn.key_shift = make_shift(f.layer(i, f.attention))
    if plan.prefix:
        assert make_prefix is not None
        paths = [f.layer(i, f.attention) for i in range(geometry.layers)]
        hang_prefix(model, f.rotary, {path: make_prefix(path) for path in paths})
    norm(f.final_norm)
    linear(f.head, embedding if geometry.tied else None)
    config: Any = model.config
    config._attn_implementation = attention.NAME
    if made != set(plan.activations):
        raise RuntimeError(
            f"the plan's activations have no place in the model: {sorted(set(plan.activations) - made)}"
        )
    refuse_uncovered(model, plan)


def norm_eps(norm: Any) -> float:
    """Epsilon of a norm module, whatever the architecture calls it."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise RuntimeError(f"{type(norm).__name__} has neither variance_epsilon nor eps")


def refuse_uncovered(model: nn.Module, plan: Plan) -> None:
    """Every module of the decoder that computes must be one of ours.

    Raises:
        RuntimeError: names the float modules left, whose tensors a converter would encode by itself.
    """
    modules = (QuantLinear, QuantNorm, QuantEmbedding, QuantActivation, Quantizer)
    ours = (*modules, QWeight, FormatWeight, TunableWeight, TunableBias, Prefix, KeyShift)
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, ours))
    left = []
    for name, module in model.named_modules():
        is_leaf = not any(True for _ in module.children())
        if not is_leaf or isinstance(module, ours) or name.startswith(inside) or name == plan.family.rotary:
            continue
        if isinstance(module, nn.Dropout | nn.Identity) or not name:
            continue
        left.append(f"{name} ({type(module).__name__})")
    if left:
        raise RuntimeError(f"these modules have no place in the plan and would stay float: {', '.join(left)}")
