"""Does every float tensor of an ONNX graph have an encoding?

A tensor without one is calibrated again by the converter, silently, or falls back to 16-bit float (reported in public
issues of AIMET). So nothing is written unless all are covered and tensors that share codes share their encoding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tensor import TensorEncoding

if TYPE_CHECKING:
    import onnx

# Operators whose output holds values of their inputs -> how many leading inputs it takes them from (None: all).
MOVING: dict[str, int | None] = {
    "Concat": None,
    "Expand": 1,
    "Flatten": 1,
    "Gather": 1,
    "Identity": 1,
    "Reshape": 1,
    "Slice": 1,
    "Split": 1,
    "Squeeze": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
}
_CACHE = re.compile(r"(past_(?:key|value)_\d+)_(in|out)")
_SHOWN = 8


@dataclass(frozen=True)
class Coverage:
    """Counts over the float tensors of a graph.

    Args:
        tensors: float inputs, node outputs, and constants that a node reads.
        integers: tensors with an entry of integers.
        floats: tensors with an entry of 16-bit floats.
        inherited: outputs of data movement with the encoding of what they move, entry of their own or not.
        converts: outputs of data movement that are rounded to an encoding of their own.
    """

    tensors: int
    integers: int
    floats: int
    inherited: int
    converts: tuple[str, ...] = ()


def check_coverage(
    model: onnx.ModelProto, encodings: Sequence[TensorEncoding], *, rounded: Collection[str] = ()
) -> Coverage:
    """Compare encodings with the graph they are for.

    Args:
        model: a float graph, with or without its weights' values.
        encodings: all entries.
        rounded: outputs of data movement that may have an encoding of their own, because the integer graph rounds
            there or the encoding is one inside an operation.

    Raises:
        ValueError: a tensor without an encoding, an entry for no tensor, unequal encodings on the two sides of data
            movement, or a cache whose output does not have its input's encoding. Names the tensors.
    """
    floats, constants = set(_float_tensors(model)), {t.name for t in model.graph.initializer}
    entries = {e.name: e for e in encodings}
    known, inherited, converts, torn = dict(entries), 0, [], []
    for node in model.graph.node:
        if node.op_type not in MOVING:
            continue
        sources = [known.get(name) for name in node.input[: MOVING[node.op_type]] if name in floats]
        first = sources[0] if sources else None
        for output in (name for name in node.output if name in floats):
            alike = first is not None and all(s is not None and s.same_codes(first) for s in sources)
            if first is not None and alike and known.setdefault(output, first).same_codes(first):
                inherited += 1
            elif output in entries and output in rounded:
                converts.append(output)
            elif output in entries:
                torn.append(f"{output} ({node.op_type} of {', '.join(n for n in node.input if n in floats)})")
    torn += _untied(entries, constants)
    mislabelled = [e.name for e in encodings if e.name in floats and e.is_param != (e.name in constants)]
    for names, what in (
        (sorted(floats - known.keys()), "float tensors have no encoding"),
        (sorted(entries.keys() - floats), "encodings name no float tensor of the graph"),
        (sorted(mislabelled), "encodings are in the section of parameters and not constants, or the reverse"),
        (torn, "tensors do not have the encoding of what they hold"),
    ):
        if names:
            more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
            raise ValueError(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
    stated = [entries[name].grid is not None for name in floats & entries.keys()]
    return Coverage(len(floats), sum(stated), len(stated) - sum(stated), inherited, tuple(converts))


def _float_tensors(model: onnx.ModelProto) -> Iterator[str]:
    """Names of all float tensors: inputs, outputs of nodes, constants that a node reads."""
    import onnx

    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    graph = model.graph
    made = [name for node in graph.node for name in node.output if name]
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    if any(not types.get(name) for name in made):
        graph = onnx.shape_inference.infer_shapes(model).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    if unknown := [name for name in made if not types.get(name)]:
        raise ValueError(f"the type of {len(unknown)} tensors cannot be inferred: {', '.join(unknown[:_SHOWN])}")
    types |= {t.name: t.data_type for t in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    constants = [t.name for t in graph.initializer if t.name in read]
    yield from (name for name in (*(v.name for v in graph.input), *made, *constants) if types[name] in kinds)


def _untied(entries: dict[str, TensorEncoding], constants: Collection[str]) -> Iterator[str]:
    """Caches whose new values would not fit among the old ones."""
    sides: dict[str, dict[str, TensorEncoding]] = {}
    for name, entry in entries.items():
        if name not in constants and (match := _CACHE.fullmatch(name)):
            sides.setdefault(match[1], {})[match[2]] = entry
    for cache, pair in sides.items():
        if len(pair) == 2 and not pair["in"].same_codes(pair["out"]):
            yield f"{cache}_out (appended to {cache}_in)"
