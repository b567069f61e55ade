"""The float graphs of a checkpoint with 4-bit weights, by ONNX Runtime's own quantizer.

Every product with a constant matrix, the head included, becomes ``MatMulNBits``: weights in blocks of 32 with a scale
and a zero point each, activations quantized inside the product (accuracy level 4). The rest stays float32, as it is in
the language models that ONNX Runtime's own tools write. Projections with a bias are another operator (Gemm), which the
quantizer leaves as it is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

    from .peers import Subject

BLOCK = 32
INT8_PRODUCTS = 4  # accuracy level
_INLINE = 1024  # bytes of a constant that stays in the graph


def write_int4(subject: Subject) -> Path:
    """Prompt and token graph, over one file of weights, in a folder below ``subject.scratch``."""
    import onnx

    quantizer_of = _quantizer()
    from ..exporters.onnx import export_onnx
    from ..exporters.options import ExportOptions

    folder = subject.scratch / "onnx-int4"
    folder.mkdir()
    context = subject.prompt + subject.tokens
    options = ExportOptions(context=context, prompt_length=subject.prompt, qdq=False, integer_io=False)
    export_onnx(subject.folder, folder, options)
    prompt, token = folder / "prompt.onnx", folder / "token.onnx"
    quantizer = quantizer_of(str(prompt), bits=4, block_size=BLOCK, accuracy_level=INT8_PRODUCTS)
    quantizer.process()
    prompt.unlink()
    onnx.save_model(
        quantizer.model.model, prompt, save_as_external_data=True, location="int4.data", size_threshold=_INLINE
    )
    del quantizer
    made, other = (onnx.load(path, load_external_data=False) for path in (prompt, token))
    take_over(made, other)
    onnx.save_model(other, token)
    (folder / "model.data").unlink()
    return folder


def _quantizer() -> Any:
    """ONNX Runtime's class. Its module sets up the root logger when it is imported, and reports every node."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)
    return matmul_nbits_quantizer.MatMulNBitsQuantizer


def take_over(made: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Give ``other`` the products and the constants of ``made``, a graph of the same model for more tokens."""
    products = {node.input[1]: node for node in made.graph.node if node.op_type == "MatMulNBits"}
    for node in other.graph.node:
        if node.op_type == "MatMul" and (found := products.get(f"{node.input[1]}_Q4")) is not None:
            inputs, outputs = [node.input[0], *found.input[1:]], list(node.output)
            node.CopyFrom(found)
            node.ClearField("input"), node.ClearField("output")
            node.input.extend(inputs), node.output.extend(outputs)
    read = {name for node in other.graph.node for name in node.input}
    known = {tensor.name: tensor for tensor in made.graph.initializer}
    own = {tensor.name: tensor for tensor in other.graph.initializer}
    # A constant of both graphs lies in the new file; a shape may bear the same name and differ, and lies in its graph.
    kept = [known[n] if n not in own or own[n].external_data else own[n] for n in read if n in known or n in own]
    other.graph.ClearField("initializer")
    other.graph.initializer.extend(kept)
    other.ClearField("opset_import")
    other.opset_import.extend(made.opset_import)
