"""The forms in which one integer graph can be written, and the names and shapes at its border.

The names and the mobile layout are the convention of Qualcomm's language-model graphs (qai-hub-models, Genie): head
count first, keys transposed, new slices of the cache as outputs, rotary tables of half the rotating dims.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...graph.ir import BATCH, PAST, SEQUENCE, TOTAL, Dim, Graph


@dataclass(frozen=True)
class Form:
    """How a graph is written.

    Args:
        qdq: QuantizeLinear/DequantizeLinear around the operations; off gives plain floats under the same names.
        integer_io: integers at inputs and outputs that have an encoding (needs ``qdq``).
        cover_all: pairs on every float tensor, derived encodings included, not only where the plan rounds.
        converts: changes of grid as pairs of their own where the Hexagon NPU has no operator for mixed 8 and 16 bits
            (found by trying each operator; see docs/onnx.md).
    """

    qdq: bool = True
    integer_io: bool = True
    cover_all: bool = False
    converts: bool = False

    def __post_init__(self) -> None:
        if not self.qdq and (self.integer_io or self.cover_all or self.converts):
            raise ValueError("integer_io, cover_all and converts need the quantized form (qdq=True)")


# What the plan says and nothing more: the form to compare with the simulation.
REFERENCE = Form()
# The same graph without rounding: what an encodings file describes.
FLOAT = Form(qdq=False, integer_io=False)
# What an NPU compiler needs: an encoding on every tensor.
COVERED = Form(cover_all=True, converts=True)


@dataclass(frozen=True)
class Layout:
    """Sizes of one graph; ``sequence`` and ``past`` are numbers (mobile layout) or None (dynamic, batch first)."""

    sequence: int | None
    past: int | None

    @property
    def dynamic(self) -> bool:
        return self.sequence is None

    @classmethod
    def fixed(cls, sequence: int, context: int) -> Layout:
        """``sequence`` new tokens of ``context``.

        Raises:
            ValueError: no room for past tokens.
        """
        if not 1 <= sequence < context:
            raise ValueError(f"{sequence} new tokens do not fit in a context of {context} with room for past ones")
        return cls(sequence, context - sequence)

    def resolve(self, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """Symbols replaced by numbers, where they are fixed."""
        if self.sequence is None or self.past is None:
            return shape
        known = {BATCH: 1, SEQUENCE: self.sequence, PAST: self.past, TOTAL: self.sequence + self.past}
        return tuple(known[dim] if isinstance(dim, str) else dim for dim in shape)

    def cache(self, graph: Graph, is_key: bool, length: str) -> tuple[Dim, ...]:
        """Shape in which the graph holds cached (``past``), new (``sequence``) or all (``total``) keys or values."""
        count, size = graph.facts["kv_heads"], graph.facts["head_dim"]
        if self.dynamic:
            return (BATCH, count, length, size)
        return self.resolve((count, 1, size, length) if is_key else (count, 1, length, size))


def border_inputs(graph: Graph) -> dict[str, str]:
    """Inputs of the integer graph -> their names in ONNX graphs, in their order."""
    names = {"position_cos": "position_ids_cos", "position_sin": "position_ids_sin"}
    return {name: f"{name}_in" if name.startswith("past_") else names.get(name, name) for name in graph.inputs}


def border_outputs(graph: Graph) -> dict[str, str]:
    """Outputs of the integer graph -> their names in ONNX graphs, in their order."""
    logits, *present = graph.outputs
    names = {logits: "logits"}
    for i in range(graph.facts["layers"]):
        names |= {present[2 * i]: f"past_key_{i}_out", present[2 * i + 1]: f"past_value_{i}_out"}
    return names
