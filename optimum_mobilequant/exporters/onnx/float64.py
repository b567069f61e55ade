"""An exported graph with every float32 operation in float64: what the file means, without float32's rounding.

ONNX quantizes and dequantizes in float32 only. A sum that float32 rounds to the other side of a boundary moves a code
by one, and the layers behind pass that on, so two correct float32 runs of one graph already differ. Computing the same
graph in float64 tells such a move from a fault of the export. It is slow and for checking only; the file stays as it
is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..options import require
from .runtime import Session

_FLOAT, _INT32, _DOUBLE = 1, 6, 11  # of TensorProto; onnx itself is imported late, since it is an extra


def float64_session(path: Path) -> Session:
    """As :func:`~.runtime.cpu_session`, of the graph in float64. Inputs and outputs keep their types.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        ValueError: an operation that has no form in float64 here.
    """
    require("onnx", "onnx", "onnxruntime")
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # the weights stay in their file, however large it is
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    model = onnx.load(str(path), load_external_data=False)
    return ort.InferenceSession(widen(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def widen(model: Any) -> Any:
    """The ModelProto with float64 in place of float32.

    Raises:
        ValueError: an operation that is not known to exist in float64.
    """
    import onnx

    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    writer = _Writer(graph, onnx.helper)
    nodes = list(graph.node)
    del graph.node[:]
    for value in graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            writer.renamed[value.name] = writer.cast(value.name, _DOUBLE)
    for node in nodes:
        if node.op_type in _REWRITES:
            _REWRITES[node.op_type](writer, node)
        elif node.op_type in _SAME:
            writer.copy(node)
        else:
            raise ValueError(
                f"{node.op_type} is not known in float64: add it to {__name__}, or compare with --onnx alone"
            )
    for value in graph.output:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            source = writer.renamed.get(value.name)
            if source is None:  # made by a copied node under its own name
                source = value.name + "/float64"
                for node in graph.node:
                    node.output[:] = [source if name == value.name else name for name in node.output]
                    node.input[:] = [source if name == value.name else name for name in node.input]
            writer.node("Cast", [source], value.name, to=onnx.TensorProto.FLOAT)
    del graph.value_info[:]
    return out


# Kernels for float64 exist, and results do not depend on anything else.
_SAME = {"Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Softmax", "Sigmoid", "Relu", "Tanh"} | {
    "Reshape", "Transpose", "Slice", "Concat", "Gather", "Split", "Squeeze", "Unsqueeze",
}  # fmt: skip


class _Writer:
    """Appends nodes to a graph; float tensors under ``renamed`` names are float64."""

    def __init__(self, graph: Any, helper: Any):
        self.graph, self.helper = graph, helper
        self.renamed: dict[str, str] = {}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.wide: dict[str, str] = {}  # float32 constants, widened once
        self.count = 0

    def node(self, kind: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        if output is None:
            self.count += 1
            output = f"float64/{self.count}"
        self.graph.node.append(self.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def cast(self, name: str, to: int) -> str:
        return self.node("Cast", [name], to=to)

    def constant(self, value: Any) -> str:
        import onnx

        self.count += 1
        name = f"float64/{self.count}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def double(self, name: str) -> str:
        """A float tensor of the original graph, as float64."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != _FLOAT:  # all others are float64 by now, or integers
            return self.renamed.get(name, name)
        if name not in self.wide:
            self.wide[name] = self.cast(name, _DOUBLE)
        return self.wide[name]

    def copy(self, node: Any) -> None:
        new = type(node)()
        new.CopyFrom(node)
        new.input[:] = [self.double(name) for name in node.input]
        self.graph.node.append(new)

    def along(self, name: str, node: Any, rank: int) -> str:
        """A scale or zero point for each channel, shaped for a tensor of ``rank`` dimensions."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        tensor = self.constants.get(name)
        if tensor is None or not tensor.dims:
            return name
        shape = np.ones(rank, np.int64)
        shape[axis] = -1
        return self.node("Reshape", [name, self.constant(shape)])


def _dequantize(w: _Writer, node: Any) -> None:
    codes, scale, *zero = node.input
    tensor = w.constants.get(codes)
    if tensor is not None and tensor.data_type == _INT32:  # biases: beyond float32's whole numbers
        steps = w.cast(codes, _DOUBLE)
        if zero:
            steps = w.node("Sub", [steps, w.along(w.cast(zero[0], _DOUBLE), node, len(tensor.dims))])
    else:
        # with a step of one the result is a whole number below 2^17, exact in float32, whatever the type of the codes
        ones = w.constant(np.ones(tuple(w.constants[scale].dims), np.float32))
        attributes = {a.name: a.i for a in node.attribute if a.name in ("axis", "block_size")}
        steps = w.cast(w.node("DequantizeLinear", [codes, ones, *zero], **attributes), _DOUBLE)
    rank = len(tensor.dims) if tensor is not None else 0
    wide = w.double(scale)
    if w.constants[scale].dims:
        shape = np.ones(rank, np.int64)
        shape[next((a.i for a in node.attribute if a.name == "axis"), 1)] = -1
        wide = w.node("Reshape", [wide, w.constant(shape)])
    w.node("Mul", [steps, wide], node.output[0])


def _quantize(w: _Writer, node: Any) -> None:
    from onnx.helper import tensor_dtype_to_np_dtype

    x, scale, zero = node.input
    kind = w.constants[zero].data_type
    limits = np.iinfo(tensor_dtype_to_np_dtype(kind))
    steps = w.node("Round", [w.node("Div", [w.double(x), w.double(scale)])])
    shifted = w.node("Add", [steps, w.cast(zero, _DOUBLE)])
    clipped = w.node("Clip", [shifted, *(w.constant(np.float64(v)) for v in (limits.min, limits.max))])
    w.node("Cast", [clipped], node.output[0], to=kind)


def _norm(w: _Writer, node: Any, *, centred: bool) -> None:
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    x, axis = w.double(node.input[0]), w.constant(np.array([-1], np.int64))
    if centred:
        x = w.node("Sub", [x, w.node("ReduceMean", [x, axis], keepdims=1)])
    square = w.node("ReduceMean", [w.node("Mul", [x, x]), axis], keepdims=1)
    # the attribute is a float32; its shortest decimal is what the model's config says
    root = w.node("Sqrt", [w.node("Add", [square, w.constant(np.float64(str(np.float32(epsilon))))])])
    scaled = [w.node("Div", [x, root]), w.double(node.input[1])]
    if len(node.input) > 2:
        w.node("Add", [w.node("Mul", scaled), w.double(node.input[2])], node.output[0])
    else:
        w.node("Mul", scaled, node.output[0])


def _gelu(w: _Writer, node: Any) -> None:
    if any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute):
        w.copy(node)
        return
    # ONNX Runtime has no float64 kernel for Erf, so this one function stays in float32
    narrow = w.node("Gelu", [w.cast(w.double(node.input[0]), _FLOAT)])
    w.node("Cast", [narrow], node.output[0], to=_DOUBLE)


_REWRITES: dict[str, Callable[[_Writer, Any], None]] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Gelu": _gelu,
    "RMSNormalization": lambda w, node: _norm(w, node, centred=False),
    "LayerNormalization": lambda w, node: _norm(w, node, centred=True),
}
