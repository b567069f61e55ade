"""One integer graph as one ONNX model.

Nodes are made directly, by a table from kinds of operations to emitters, so every name is the integer graph's own and
nothing renames, folds or fuses on the way. A float tensor ``x`` of the quantized form appears three times: ``x.float``
(as computed), ``x.codes`` (integers) and ``x`` (dequantized, what consumers read); the float form has ``x`` alone. At
an integer input or output ``x`` is the codes, and ``x.value`` what consumers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...graph import Encoding, Graph, Op
from ...graph.ir import Dim
from .form import Form, Layout, border_inputs, border_outputs
from .initializers import Initializers
from .store import WeightStore
from .types import CODE_TYPES, Record, mask_encoding, unsigned

# RMSNormalization is one operator from 23 on; decomposed, its inner tensors break 8- and 16-bit hardware.
OPSET = 23
# The first IR with 4-bit integers and metadata of nodes; newer ones shut older runtimes out.
IR_VERSION = 10
# Metadata of each node: the operation of the integer graph it belongs to, which is named after a module.
NODE_SOURCE = "mobilequant.operation"


@dataclass(frozen=True)
class Emitted:
    """An ONNX model and what its tensors mean.

    Args:
        model: the proto; weights lie in the store's file.
        records: every float tensor by the name it has in the float form, in the order of the data flow: graph inputs,
            constants that operations read, node outputs.
    """

    model: onnx.ModelProto
    records: dict[str, Record]


def emit(graph: Graph, layout: Layout, form: Form, store: WeightStore, *, name: str) -> Emitted:
    """Write ``graph`` for the sizes of ``layout`` in the given form.

    Args:
        store: gets the weights; graphs of one export share it, and then their weights.
        name: of the ONNX graph.

    Raises:
        ValueError: an operation or an activation function that has no ONNX form here.
    """
    return Emitter(graph, layout, form, store).run(name)


class Emitter:
    """State of one emission. The functions of :mod:`.kinds` call the public methods."""

    def __init__(self, graph: Graph, layout: Layout, form: Form, store: WeightStore):
        self.graph, self.layout, self.form = graph, layout, form
        self.held = Initializers(graph, store)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: dict[str, onnx.ValueInfoProto] = {}
        self.records: dict[str, Record] = {}
        self.shapes: dict[str, tuple[Dim, ...]] = {}
        self.read: dict[str, str] = {}  # tensor of the integer graph -> the ONNX tensor that consumers read
        self.border = border_outputs(graph)
        self.operation = ""

    def run(self, name: str) -> Emitted:
        """Emit all operations and close the model."""
        from .kinds import EMITTERS

        for value, border in border_inputs(self.graph).items():
            self._input(value, border)
        for op in self.graph.ops:
            self.operation = op.name
            EMITTERS[op.kind](self, op)
        self._drop_unread()
        outputs = [self.outputs[border] for border in self.border.values()]
        model = helper.make_model(
            helper.make_graph(self.nodes, name, self.inputs, outputs, list(self.held.protos.values())),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="optimum-mobilequant",
        )
        return Emitted(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), self.records)

    # For the emitters of operations.

    def encoding(self, value: str) -> Encoding | None:
        """Of a tensor of the integer graph, as ONNX states it."""
        found = self.graph.values[value].encoding
        return None if found is None else unsigned(found)

    def shape(self, value: str) -> tuple[Dim, ...]:
        """Of a tensor of the integer graph, with the numbers of this layout."""
        return self.layout.resolve(self.graph.values[value].shape)

    def inputs_of(self, op: Op) -> list[str]:
        """ONNX tensors that an operation reads: dequantized constants and activations."""
        return [self.constant(name) if name in self.graph.constants else self.read[name] for name in op.inputs]

    def result(self, op: Op, kind: str | None, inputs: Sequence[str], **attributes: Any) -> str:
        """The node that makes the operation's output; without a ``kind``, the only input on the output's grid."""
        value = self.graph.values[op.output]
        name = self.border.get(op.output, op.output) if op.output == self.graph.outputs[0] else op.output
        origin = "plan" if value.moved_from is None else "move"
        shape, encoding = self.shape(op.output), self.encoding(op.output)
        self.read[op.output] = self.node(kind, inputs, name, shape, encoding, origin, op.output, **attributes)
        return self.read[op.output]

    def result_codes(self, op: Op, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """The operation's output from a node that makes its codes, such as a lookup in a table of codes."""
        name, shape, encoding = op.output, self.shape(op.output), self.encoding(op.output)
        assert encoding is not None and name not in self.border
        self.records[name] = Record(name, encoding, None, "plan", name)
        self._add(kind, inputs, f"{name}.codes", **attributes)
        self.read[name] = self._dequantize(name, f"{name}.codes", name, encoding, shape)
        return self.read[name]

    def inner(
        self, op: Op, part: str, kind: str, inputs: Sequence[str], like: str | Encoding | None, shape: Any, **more: Any
    ) -> str:
        """A node inside an operation, called ``<operation>.<part>``.

        Args:
            like: the tensor of the integer graph whose codes this one moves, or a derived encoding.
        """
        encoding = self.encoding(like) if isinstance(like, str) else like
        origin, source = ("move", like) if isinstance(like, str) else ("derived", op.output)
        return self.node(kind, inputs, f"{op.name}.{part}", shape, encoding, origin, source, **more)

    def node(
        self,
        kind: str | None,
        inputs: Sequence[str],
        name: str,
        shape: Sequence[Dim],
        encoding: Encoding | None,
        origin: str,
        source: str,
        **attributes: Any,
    ) -> str:
        """Add a node whose float result is called ``name``, rounded if the form says so; returns what is read.

        Without a ``kind`` there is no node, only the rounding of the one input.
        """
        shape = self.layout.resolve(tuple(shape))
        self.records[name] = Record(name, encoding, None, origin, source)
        at_border = name in self.border.values()
        if encoding is None or not self.form.qdq or not (origin == "plan" or at_border or self.form.cover_all):
            assert kind is not None
            self._add(kind, inputs, name, **attributes)
            self.shapes[name] = shape
            if at_border:
                self.outputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            return name
        computed = inputs[0]
        if kind is not None:
            computed = f"{name}.float"
            self._add(kind, inputs, computed, **attributes)
        codes, value = self._names(name, at_border)
        self._add("QuantizeLinear", [computed, *self.held.parameters(name, encoding)], codes)
        if at_border:
            code_type = self._code_type(encoding) if self.form.integer_io else TensorProto.FLOAT
            self.outputs[name] = helper.make_tensor_value_info(name, code_type, shape)
        return self._dequantize(name, codes, value, encoding, shape)

    def converted(self, x: str, name: str, encoding: Encoding, source: str) -> str:
        """``x`` on another grid, as a tensor called ``name``; made once."""
        if name not in self.records:
            self.node(None, [x], name, self.shapes[x], encoding, "plan", source)
        return name

    def reshape(self, op: Op, part: str | None, x: str, shape: Sequence[Dim], like: str | Encoding | None) -> str:
        """Reshape to ``shape``, as the operation's output (``part`` None) or inside it."""
        shape = self.layout.resolve(tuple(shape))
        old = self.shapes[x]
        # 0 keeps the dimension at its place, -1 is what is left: enough for one symbol that is computed.
        numbers = [d if isinstance(d, int) else 0 if old[i : i + 1] == (d,) else -1 for i, d in enumerate(shape)]
        if numbers.count(-1) > 1:
            raise RuntimeError(f"the shape {shape} of {op.output} has more than one dimension to compute")
        target = self.held.small(f"{op.output if part is None else f'{op.name}.{part}'}.shape", np.array(numbers))
        if part is None:
            return self.result(op, "Reshape", [x, target])
        return self.inner(op, part, "Reshape", [x, target], like, shape)

    def constant(self, name: str, *, transposed: bool = False, steps: int = 1) -> str:
        """Float tensor of a constant of the integer graph: itself in the float form, else dequantized codes.

        Args:
            transposed: a matrix as (in, out).
            steps: each step of a per-channel bias as so many finer ones; the values stay.
        """
        stored, emitted = self.graph.values[name].encoding, name if steps == 1 else f"{name}.wide"
        if emitted in self.records:
            return emitted
        axis = None if stored is None or stored.scale.ndim == 0 else int(transposed != stored.per_block)
        stated = None if stored is None else unsigned(stored)
        if stated is not None and steps != 1:
            stated = stated.scaled(1 / steps)
        self.records[emitted] = Record(emitted, stated, axis, "constant", name)
        shape = self.graph.values[name].shape
        self.shapes[emitted] = shape[::-1] if transposed else shape
        if stated is not None and self.form.qdq:
            codes = self.held.codes(name, transposed=transposed, steps=steps)
            return self._dequantize(emitted, codes, emitted, stated, self.shapes[emitted], axis=axis)
        return self.held.floats(name, transposed=transposed)

    # Inside.

    def _input(self, value: str, name: str) -> None:
        shape, encoding = self.shape(value), self.encoding(value)
        if value == "input_ids":
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
            self.read[value], self.shapes[name] = name, shape
            return
        if value == "attention_mask":
            encoding = mask_encoding(self.graph)
        elif value.startswith("past_"):
            shape = self.layout.resolve(self.layout.cache(self.graph, value.startswith("past_key"), "past"))
        self.records[name] = Record(name, encoding, None, "plan", value)
        self.shapes[name] = shape
        self.read[value] = name
        code_type: int = TensorProto.FLOAT
        if encoding is not None and self.form.qdq:
            codes, read = (name, f"{name}.value") if self.form.integer_io else (f"{name}.codes", f"{name}.value")
            if self.form.integer_io:
                code_type = self._code_type(encoding)
            else:
                self._add("QuantizeLinear", [name, *self.held.parameters(name, encoding)], codes)
            self.read[value] = self._dequantize(name, codes, read, encoding, shape)
        self.inputs.append(helper.make_tensor_value_info(name, code_type, shape))

    def _names(self, name: str, at_border: bool) -> tuple[str, str]:
        """Names of the codes of ``name`` and of what consumers read."""
        return (name, f"{name}.value") if at_border and self.form.integer_io else (f"{name}.codes", name)

    def _code_type(self, encoding: Encoding) -> int:
        return CODE_TYPES[encoding.grid.bits, encoding.grid.signed][0]

    def _dequantize(
        self, name: str, codes: str, value: str, encoding: Encoding, shape: tuple[Dim, ...], axis: int | None = None
    ) -> str:
        attributes = {} if axis is None else {"axis": axis}
        if encoding.block_size:
            attributes["block_size"] = encoding.block_size
        self._add("DequantizeLinear", [codes, *self.held.parameters(name, encoding)], value, **attributes)
        self.shapes[value] = shape
        return value

    def _add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        node = helper.make_node(kind, list(inputs), [output], name=output, **attributes)
        if self.operation:
            node.metadata_props.add(key=NODE_SOURCE, value=self.operation)
        self.nodes.append(node)

    def _drop_unread(self) -> None:
        """Integer outputs that no node reads need no dequantized copy."""
        read = {name for node in self.nodes for name in node.input} | set(self.outputs)
        self.nodes = [n for n in self.nodes if n.op_type != "DequantizeLinear" or n.output[0] in read]
