"""Write the graphs of a checkpoint and what a caller of them has to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from safetensors.numpy import save_file
from torch import Tensor

from ...graph import Encoding
from ...graph.memory import plan_memory
from ...numerics import quantize
from ..folder import write_json
from ..options import ExportOptions, ExportResult
from ..source import Source, open_checkpoint
from .emit import NODE_SOURCE, Emitted, emit
from .form import Form, Layout
from .prefix import write_prefix
from .store import Array, WeightStore
from .types import FLOAT_HIDDEN, code_array, limits

WEIGHTS, GRAPHS, NAMES, ROTARY = "model.data", "graphs.json", "names.json", "rotary.safetensors"
MEMORY = "memory_plan.json"
PROMPT, TOKEN, DYNAMIC = "prompt", "token", "model_dynamic"


def export_onnx(checkpoint: Path, out: Path, options: ExportOptions) -> ExportResult:
    """Prompt and token graphs of the integer model over one file of weights, with names, rotary tables, memory plan.

    Args:
        checkpoint: a folder that ``save_pretrained`` wrote.
        out: an empty folder.

    Raises:
        ValueError: see :func:`~..source.open_checkpoint` and :func:`~.emit.emit`.
    """
    source = open_checkpoint(checkpoint)
    form = Form(qdq=options.qdq, integer_io=options.integer_io)
    emitted = write_graphs(source, out, options, form)
    write_callers_files(source, out, options, emitted)
    steps = (options.prompt_length, 1)
    sizes = [{"batch": 1, "sequence": step, "past": options.context - step} for step in steps]
    memory = plan_memory(source.graph).to_dict(sizes)
    write_json(out / MEMORY, memory)
    nodes = {name: len(graph.model.graph.node) for name, graph in emitted.items()}
    summary = {"nodes": nodes, "context": options.context, "prompt_length": options.prompt_length}
    summary |= {"weight_bytes": memory["weight_bytes"], "cache_bytes": memory["placed"][0]["cache_bytes"]}
    summary["arena_bytes"] = {
        name: p["arena_bytes"] for name, p in zip((PROMPT, TOKEN), memory["placed"], strict=True)
    }
    return ExportResult.of("onnx", out, summary)


def write_graphs(source: Source, out: Path, options: ExportOptions, form: Form) -> dict[str, Emitted]:
    """``prompt.onnx``, ``token.onnx`` and, if asked for, ``model_dynamic.onnx``, sharing ``model.data``.

    Returns:
        graph name -> what was emitted.
    """
    layouts = {
        PROMPT: Layout.fixed(options.prompt_length, options.context),
        TOKEN: Layout.fixed(1, options.context),
    }
    if options.dynamic:
        layouts[DYNAMIC] = Layout(None, None)
    emitted = {}
    with WeightStore(out / WEIGHTS) as store:
        for name, layout in layouts.items():
            emitted[name] = emit(source.graph, layout, form, store, name=name)
            onnx.save_model(emitted[name].model, out / f"{name}.onnx")
    return emitted


def write_callers_files(source: Source, out: Path, options: ExportOptions, emitted: dict[str, Emitted]) -> None:
    """``graphs.json`` (inputs and outputs), ``names.json`` (tensor -> tensor and operation of the integer graph),
    ``rotary.safetensors`` (cos and sin of every position, as the graphs' inputs want them) and, for a checkpoint with
    a prefix, ``prefix.safetensors`` (what the first slots of the cache hold from the start)."""
    described: dict[str, Any] = {
        "context": options.context,
        "prompt_length": options.prompt_length,
        "weights": WEIGHTS,
        "rotary": ROTARY,
        "facts": source.graph.facts,
        "graphs": {
            name: {
                "file": f"{name}.onnx",
                "inputs": {v.name: _port(v, graph) for v in graph.model.graph.input},
                "outputs": {v.name: _port(v, graph) for v in graph.model.graph.output},
            }
            for name, graph in emitted.items()
        },
    }
    if (prefix := write_prefix(source.graph, out, floats=not options.integer_io)) is not None:
        described["prefix"] = prefix
    write_json(out / GRAPHS, described)
    graph = emitted[PROMPT]
    owner = {n.output[0]: p.value for n in graph.model.graph.node for p in n.metadata_props if p.key == NODE_SOURCE}
    names = {
        name: {"tensor": r.source, "origin": r.origin, "operation": owner.get(f"{name}.float", owner.get(name))}
        for name, r in graph.records.items()
    }
    write_json(out / NAMES, names)
    encoding = source.graph.values["position_cos"].encoding
    tables: dict[str, Array] = {}
    for part, table in zip(("cos", "sin"), source.rotary_tables(options.context), strict=True):
        tables[part] = table.numpy() if encoding is None else _codes(table, encoding)
    save_file(tables, out / ROTARY)


def _codes(table: Tensor, encoding: Encoding) -> Array:
    return code_array(quantize(table, encoding.scale, encoding.zero_point, encoding.grid), encoding)[1]


def _port(value: onnx.ValueInfoProto, graph: Emitted) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    port: dict[str, Any] = {"type": onnx.TensorProto.DataType.Name(kind.elem_type).lower(), "shape": shape}
    record = graph.records.get(value.name)
    encoding = None if record is None else record.encoding
    if encoding is not None:
        port |= {
            "bits": encoding.grid.bits,
            "scale": float(encoding.scale),
            "zero_point": int(encoding.zero_point),
        }
    if value.name == "attention_mask":
        if encoding is not None and port["type"] != "float":
            port |= {"visible": port["zero_point"], "hidden": 0}
        else:
            port |= {"visible": 0.0, "hidden": FLOAT_HIDDEN if encoding is None else limits(encoding)[0]}
    return port
