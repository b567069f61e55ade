"""Build the integer graph of a quantized model from its plan and its modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..nn.dynamic import refuse_dynamic
from ..nn.prefix import prefix_codes
from ..numerics import Grid
from ..plan import Plan, refuse_formats
from .ir import BATCH, MOVES, PAST, SEQUENCE, TOTAL, Dim, Encoding, Graph, Op, Value
from .source import CheckpointSource, Constant, TensorSource

# Rotary tables that change with the length of the text cannot be inputs computed once for each position.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def build_graph(model: PreTrainedModel, plan: Plan, source: TensorSource | None = None) -> Graph:
    """Lay the decoder of a quantized model out as integer operations.

    Args:
        model: what ``from_pretrained`` returns for a checkpoint of this package.
        plan: its plan.
        source: the tensors, where they are not those of ``model``.

    Raises:
        ValueError: a rotary embedding whose tables depend on the length of the text; weights in a storage format; a
            model inside ``token_adaptive``.
    """
    return _Builder(model, plan, source or CheckpointSource(model, plan)).build()


class _Builder:
    def __init__(self, model: PreTrainedModel, plan: Plan, source: TensorSource):
        refuse_formats(plan)
        refuse_dynamic(model, "an integer graph")
        self.model, self.plan, self.source = model, plan, source
        g = plan.geometry
        self.graph = Graph({}, [], [], [], {}, {name: getattr(g, name) for name in _FACTS})
        for i, (keys, values) in enumerate(prefix_codes(model)):
            self.graph.prefix |= {f"past_key_{i}": keys.cpu(), f"past_value_{i}": values.cpu()}
        rotary: Any = model.get_submodule(plan.family.rotary)
        if (kind := getattr(rotary, "rope_type", "default")) not in _STATIC_ROPE:
            raise ValueError(
                f'rotary embedding of type "{kind}" changes its tables with the length of the text; exported are '
                f"{', '.join(_STATIC_ROPE)}"
            )

    def build(self) -> Graph:
        plan, f, g = self.plan, self.plan.family, self.plan.geometry
        hidden, table = (BATCH, SEQUENCE, g.hidden), (BATCH, 1, SEQUENCE, g.rotary_dims // 2)
        self.input("input_ids", (BATCH, SEQUENCE), None)
        self.input("attention_mask", (BATCH, 1, SEQUENCE, TOTAL), None)
        for name in ("position_cos", "position_sin"):
            self.input(name, table, self.source.activation(f"{f.rotary}.output"))
        cache = (BATCH, g.kv_heads, PAST, g.head_dim)
        for i in range(g.layers):
            attn = f.layer(i, f.attention)
            self.input(f"past_key_{i}", cache, self.source.activation(f"{attn}.key_rotated"))
            self.input(f"past_value_{i}", cache, self.source.activation(f"{f.layer(i, f.value)}.output"))

        embedded = f"{f.embedding}.output"
        table_name = self.constant(f"{f.embedding}.table", self.source.table(), "embedding")
        residual = self.op("embedding", f.embedding, ("input_ids", table_name), embedded, hidden, "embedding")
        present: list[str] = []
        for i in range(g.layers):
            normed = self.norm(f.layer(i, f.input_norm), residual, hidden)
            attended, kv = self.attention(i, normed)
            present += kv
            middle = f"{f.layer(i, f.mlp_norm)}.input"
            self.op("add", f"{f.layer(i)}.attention_residual", (residual, attended), middle, hidden, "residual")
            fed = self.mlp(i, self.norm(f.layer(i, f.mlp_norm), middle, hidden))
            residual = self.op("add", f.layer(i), (middle, fed), f"{f.layer(i)}.output", hidden, "residual")
        logits = self.linear(f.head, self.norm(f.final_norm, residual, hidden))
        self.graph.outputs = [logits, *present]
        covered = {name for name, value in self.graph.values.items() if value.role != "input"}
        if left := set(plan.activations) - covered - {f"{f.rotary}.output"}:
            raise RuntimeError(f"activations of the plan without an operation: {sorted(left)}")
        return self.graph

    def attention(self, i: int, x: str) -> tuple[str, list[str]]:
        f, g = self.plan.family, self.plan.geometry
        attn = f.layer(i, f.attention)
        fold = self.softmax_scale(attn)

        def heads(part: str, count: int, norm: str | None, factor: float) -> str:
            name = f.layer(i, part)
            # 1/sqrt(D) goes into what makes the query: the norm's gain if there is one, else the projection.
            flat = self.linear(name, x, 1.0 if norm else factor)
            shape = (BATCH, count, SEQUENCE, g.head_dim)
            split = self.move("split_heads", f"{name}.heads", (flat,), shape, heads=count)
            return self.norm(f"{attn}.{norm}", split, shape, factor) if norm else split

        def rotate(name: str, source: str, count: int, factor: float, *shift: str) -> str:
            shape = (BATCH, count, SEQUENCE, g.head_dim)
            operands = (source, "position_cos", "position_sin", *shift)
            return self.op(
                "rope", name, operands, name, shape, name.rpartition(".")[2], factor, rotary_dims=g.rotary_dims
            )

        added = self.source.key_shift(attn)
        shift = () if added is None else (self.constant(f"{attn}.key_shift", added, "shift"),)
        query = rotate(f"{attn}.query_rotated", heads(f.query, g.heads, f.query_norm, fold), g.heads, fold)
        key = rotate(f"{attn}.key_rotated", heads(f.key, g.kv_heads, f.key_norm, 1.0), g.kv_heads, 1.0, *shift)
        value = heads(f.value, g.kv_heads, None, 1.0)
        cached = (BATCH, g.kv_heads, TOTAL, g.head_dim)
        keys = self.move("concat", f"{attn}.key_cache", (f"past_key_{i}", key), cached)
        values = self.move("concat", f"{attn}.value_cache", (f"past_value_{i}", value), cached)
        square = (BATCH, g.heads, SEQUENCE, TOTAL)
        scores = self.op(
            "scores", f"{attn}.scores", (query, keys), f"{attn}.scores", square, "scores", groups=g.groups
        )
        masked = f"{attn}.masked_scores"
        self.add(Value(masked, square, masked_encoding(self.source.activation(scores)), "scores"))
        self.graph.ops.append(Op("mask", masked, (scores, "attention_mask"), masked))
        weights = f"{attn}.probabilities"
        self.op("softmax", weights, (masked,), weights, square, "probabilities")
        # The quantizer is called after the heads are merged; rounding is elementwise, so the order does not matter.
        context = f"{attn}.context"
        shape = (BATCH, g.heads, SEQUENCE, g.head_dim)
        self.op("context", context, (weights, values), context, shape, "context", groups=g.groups)
        merged = self.move("merge_heads", f"{context}.merged", (context,), (BATCH, SEQUENCE, g.heads * g.head_dim))
        return self.linear(f.layer(i, f.out), merged), [key, value]

    def mlp(self, i: int, x: str) -> str:
        f, g = self.plan.family, self.plan.geometry
        wide = (BATCH, SEQUENCE, g.mlp)
        gate, up = self.linear(f.layer(i, f.gate), x), self.linear(f.layer(i, f.up), x)
        path, down = f.layer(i, f.activation), f.layer(i, f.down)
        function = activation_name(self.source.function(path))
        activated = self.op("activation", path, (gate,), f"{path}.output", wide, "activation", function=function)
        product = self.op("multiply", f"{down}.product", (activated, up), f"{down}.input", wide, "product")
        return self.linear(down, product)

    # Parts that every operation uses.

    def add(self, value: Value) -> str:
        if value.name in self.graph.values:
            raise RuntimeError(f"two tensors are called {value.name}")
        self.graph.values[value.name] = value
        return value.name

    def input(self, name: str, shape: tuple[Dim, ...], encoding: Encoding | None) -> None:
        self.graph.inputs.append(self.add(Value(name, shape, encoding, "input")))

    def op(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        output: str,
        shape: tuple[Dim, ...],
        role: str,
        factor: float = 1.0,
        **attributes: Any,
    ) -> str:
        encoding = self.source.activation(output)
        if encoding is not None and factor != 1.0:
            encoding = encoding.scaled(factor)
        self.add(Value(output, shape, encoding, role))
        self.graph.ops.append(Op(kind, name, inputs, output, attributes))
        return output

    def move(self, kind: str, output: str, inputs: tuple[str, ...], shape: tuple[Dim, ...], **attributes: Any) -> str:
        assert kind in MOVES
        source = inputs[-1]
        self.add(Value(output, shape, self.graph.values[source].encoding, "move", source))
        self.graph.ops.append(Op(kind, output, inputs, output, attributes))
        return output

    def linear(self, path: str, x: str, factor: float = 1.0) -> str:
        g, f = self.plan.geometry, self.plan.family
        owner = f.embedding if path == f.head and g.tied else path
        weight = self.weight(path, owner, factor)
        out = self.graph.values[weight].shape[0]
        operands = (x, weight, *self.bias(path, owner, factor))
        spec = self.plan.activations[f"{path}.output"]
        return self.op("linear", path, operands, spec.name, (BATCH, SEQUENCE, out), spec.role, factor)

    def norm(self, path: str, x: str, shape: tuple[Dim, ...], factor: float = 1.0) -> str:
        eps, centre = self.source.norm(path)
        operands = (x, self.weight(path, path, factor), *self.bias(path, path, factor))
        spec = self.plan.activations[f"{path}.output"]
        return self.op("norm", path, operands, spec.name, shape, spec.role, factor, eps=eps, centre=centre)

    def weight(self, path: str, owner: str, factor: float) -> str:
        weight = self.source.weight(owner).scaled(factor)
        return self.constant(f"{path}.weight", weight, self.plan.weights[path].role)

    def bias(self, path: str, owner: str, factor: float) -> tuple[str, ...]:
        bias = self.source.bias(path, owner)
        return () if bias is None else (self.constant(f"{path}.bias", bias.scaled(factor), "bias"),)

    def constant(self, name: str, constant: Constant, role: str) -> str:
        self.graph.constants[name] = constant.read
        return self.add(Value(name, constant.shape, constant.encoding, role))

    def softmax_scale(self, attention: str) -> float:
        module: Any = self.model.get_submodule(attention)
        return float(module.scaling)


_FACTS = ("layers", "heads", "kv_heads", "head_dim", "rotary_dims", "hidden", "mlp", "vocabulary")


def masked_encoding(scores: Encoding | None) -> Encoding | None:
    """Grid of the masked scores: the scores' own steps, with room below for a hidden position. None for floats.

    16-bit scores are calibrated with that room already. 8-bit ones move to the top of a 16-bit grid of equal steps, so
    that a visible score keeps its value exactly.
    """
    if scores is None or scores.grid.bits == 16:
        return scores
    wide = Grid(16, signed=False)
    return Encoding(scores.scale, scores.zero_point + (wide.qmax - scores.grid.qmax), wide)


def activation_name(function: nn.Module) -> str:
    """Key of transformers' ``ACT2FN`` that makes a module like this one.

    Raises:
        ValueError: a function of the model's own.
    """
    from transformers.activations import ACT2CLS

    for name, entry in ACT2CLS.items():
        kind, options = entry if isinstance(entry, tuple) else (entry, {})
        if type(function) is kind and all(getattr(function, key, value) == value for key, value in options.items()):
            return name
    raise ValueError(f"activation {type(function).__name__} is none of transformers' own, so it cannot be exported")
