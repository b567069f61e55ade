"""Float ONNX graphs with AIMET encodings: what QNN's converters and Qualcomm AI Hub compile.

    prompt_ar<S>_cl<C>.aimet/   model.onnx, model.data, model.encodings: the graph for S new tokens
    token_ar1_cl<C>.aimet/      the graph for one new token; the weights are the same
    io_spec.json                inputs and outputs of both graphs as integers
    prefix.safetensors          what the first slots of the cache hold from the start, if the checkpoint has a prefix
    README.md                   what each file is

AI Hub takes a folder with exactly one ``.onnx``, at most one ``.data``, one ``.encodings`` and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from ..graph import Graph
from ..log import get_logger
from .encodings import Coverage, TensorEncoding, check_coverage, tensor_encodings, write_encodings
from .folder import write_json
from .onnx import FLOAT, Emitted, Layout, WeightStore, emit
from .onnx.prefix import write_prefix
from .options import ExportOptions, ExportResult
from .source import open_checkpoint
from .targets import TARGETS, check_graph, widen_graph

logger = get_logger(__name__)

TARGET = "qnn_htp"
MODEL, WEIGHTS, ENCODINGS, IO_SPEC, README = (
    "model.onnx",
    "model.data",
    "model.encodings",
    "io_spec.json",
    "README.md",
)
IO_SPEC_VERSION = 1


def export_qnn(checkpoint: Path, out: Path, options: ExportOptions) -> ExportResult:
    """Prompt and token graph as ``.aimet`` folders, with the integers of their inputs and outputs.

    Tensors that HTP needs in 16 bits get them (see :func:`~.targets.widen_graph`); ``summary`` counts them.

    Args:
        checkpoint: a folder that ``save_pretrained`` wrote.
        out: an empty folder.

    Raises:
        ValueError: operations that HTP cannot run; damaged encodings; a tensor without an encoding; see
            :func:`~.source.open_checkpoint` and :func:`~.onnx.emit`.
    """
    source = open_checkpoint(checkpoint)
    check_graph(source.graph, TARGETS[TARGET])
    graph, widened = widen_graph(source.graph, TARGETS[TARGET])
    if widened:
        logger.info(f"{len(widened)} 8-bit tensors get 16 bits over the same range, e.g. {widened[0]}")
    emitted = write_aimet(graph, out, options)
    encodings, coverage = write_all_encodings(emitted, out, options.encodings_version)
    spec: dict[str, Any] = {
        "format_version": IO_SPEC_VERSION,
        "context": options.context,
        "prompt_length": options.prompt_length,
        "graphs": {name: io_of(graph_, encodings[name]) for name, graph_ in emitted.items()},
    }
    if (prefix := write_prefix(source.graph, out)) is not None:
        spec["prefix"] = prefix
    write_json(out / IO_SPEC, spec)
    (out / README).write_text(_readme(list(emitted), options, coverage, widened), encoding="utf-8")
    summary = {
        "encodings_version": options.encodings_version,
        "coverage": {name: asdict(found) for name, found in coverage.items()},
        "widened": widened,
    }
    return ExportResult.of("qnn", out, summary)


def write_aimet(graph: Graph, out: Path, options: ExportOptions) -> dict[str, Emitted]:
    """``model.onnx`` and ``model.data`` of both graphs, each in its ``.aimet`` folder below ``out``.

    Returns:
        graph name -> what was emitted.
    """
    context, sequences = options.context, (("prompt", options.prompt_length), ("token", 1))
    layouts = {f"{kind}_ar{n}_cl{context}": Layout.fixed(n, context) for kind, n in sequences}
    folders = {name: out / f"{name}.aimet" for name in layouts}
    for folder in folders.values():
        folder.mkdir()
    first, *others = (folder / WEIGHTS for folder in folders.values())
    emitted = {}
    with WeightStore(first) as store:
        for name, layout in layouts.items():
            emitted[name] = emit(graph, layout, FLOAT, store, name=name)
            onnx.save_model(emitted[name].model, folders[name] / MODEL)
    if not first.stat().st_size:  # all weights are small enough to lie in the graphs
        first.unlink()
        return emitted
    for path in others:  # copies: ONNX refuses to read weights from a file with several links
        shutil.copyfile(first, path)
    return emitted


def write_all_encodings(
    emitted: Mapping[str, Emitted], out: Path, version: str
) -> tuple[dict[str, list[TensorEncoding]], dict[str, Coverage]]:
    """``model.encodings`` of every graph, once all of its tensors are covered.

    Returns:
        graph name -> its encodings, and what they cover.

    Raises:
        ValueError: damaged encodings, or a tensor without one.
    """
    encodings, coverage = {}, {}
    for name, graph in emitted.items():
        encodings[name] = tensor_encodings(graph.records)
        # A shifted rotation joins its parts, of which some did not turn, on a grid of its own.
        rounded = {record.name for record in graph.records.values() if record.origin in ("plan", "derived")}
        coverage[name] = check_coverage(graph.model, encodings[name], rounded=rounded)
        write_encodings(encodings[name], out / f"{name}.aimet" / ENCODINGS, version)
    return encodings, coverage


def io_of(graph: Emitted, encodings: Sequence[TensorEncoding]) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs of a graph as integers, in their order.

    Returns:
        ``{"inputs": [...], "outputs": [...]}`` of ``{"name", "shape", "dtype"}``, with ``scale`` and ``zero_point``
        on the grid of ``dtype`` where the tensor is quantized: ``real = (code - zero_point) * scale``.
    """
    known = {e.name: e for e in encodings}

    def port(value: onnx.ValueInfoProto) -> dict[str, Any]:
        kind, encoding = value.type.tensor_type, known.get(value.name)
        found: dict[str, Any] = {"name": value.name, "shape": [dim.dim_value for dim in kind.shape.dim]}
        if encoding is None or encoding.grid is None:
            return found | {"dtype": onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name}
        grid = encoding.grid
        dtype = f"{'' if grid.signed else 'u'}int{grid.bits}"
        return found | {"dtype": dtype, "scale": encoding.scale[0], "zero_point": encoding.zero_point[0]}

    proto = graph.model.graph
    return {"inputs": [port(v) for v in proto.input], "outputs": [port(v) for v in proto.output]}


def _readme(
    names: Sequence[str], options: ExportOptions, coverage: Mapping[str, Coverage], widened: Sequence[str]
) -> str:
    prompt, token = names
    found = coverage[prompt]
    lifted = (
        f"\n{len(widened)} tensors of 8 bits have 16 here, over the same range, because HTP computes what reads or\n"
    )
    lifted += "makes them with 16 bits only; `export.json` lists them.\n"
    return f"""# Float graphs with AIMET encodings

`{prompt}.aimet` reads {options.prompt_length} new tokens, `{token}.aimet` one; both attend to {options.context}.
In each folder:

- `model.onnx`: the network in float32. It looks unquantized on purpose: compilers for QNN read the integers from the
  encodings file, and every weight already is one of the values that its integers stand for.
- `model.data`: the weights; the same in both folders.
- `model.encodings`: scale and offset of all {found.tensors} float tensors, AIMET layout {options.encodings_version}.

AI Hub takes each folder as it is: put nothing else into it. `io_spec.json` states the integers at inputs and outputs,
as they are after compiling with integer inputs and outputs.
{lifted if widened else ""}"""
