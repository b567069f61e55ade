"""A checkpoint in the compressed-tensors format, which transformers and vLLM read without this package.

The format (https://github.com/vllm-project/compressed-tensors, written against version 0.20) describes linear layers:
integer weights, and a static encoding of each layer's input. What is kept and what is not:

=====================  ============================================================================================
kept exactly           weights of all projections: integers, scales, zero points; biases
kept where allowed     inputs of the projections: 8-bit static encodings, moved from the unsigned to the signed grid
as float32             embedding table, head and norm gains, with the values of their integers
cannot be said         encodings of all else: residual sums, rotary tables, scores, probabilities, outputs, KV cache
=====================  ============================================================================================

A reader therefore computes in floats between the projections.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import check_files, skeleton
from ..checkpoint.inspection import empty_model
from ..checkpoint.pack import input_of
from ..checkpoint.reader import TensorReader
from ..graph.load import QUANTO, method_of
from ..hf_quantizer import plan_of, sentinel_key
from ..log import get_logger
from ..nn import QWeight
from ..plan import Plan
from .folder import write_json
from .linear_schemes import Scheme, choose_schemes, quantization_config, unserved
from .options import ExportOptions, ExportResult
from .source import check_weight_bits
from .weight_files import Entry, write_weights

logger = get_logger(__name__)

TARGET = "compressed-tensors"
# Rows of a float matrix that are in memory at a time.
_CHUNK_BYTES = 16 * 2**20
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "export.json")


def export_compressed_tensors(checkpoint: Path, out: Path, options: ExportOptions) -> ExportResult:
    """Write a checkpoint of this package as a compressed-tensors checkpoint.

    Tensors are converted one at a time: memory stays at a few of the largest matrices.

    Args:
        checkpoint: folder that :func:`~optimum_mobilequant.quantize` and ``save_pretrained`` wrote.
        out: an empty folder.
        options: of these, ``all_inputs`` is used. By default a projection with symmetric weights gets a static input
            only where vLLM has a kernel for it: 8-bit weights and an 8-bit input. The others are written
            weight-only. With ``all_inputs`` every static input is written, for transformers alone. Asymmetric weights
            are for transformers alone in any case.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a checkpoint of another method, a damaged one, or one with a prefix; weights of 3 or 16 bits.
    """
    if method_of(checkpoint) == QUANTO:
        raise ValueError(
            f"{str(checkpoint)!r} is a quanto model; {TARGET} is written from a checkpoint of `mobilequant quantize` "
            "only: quantize the float model with it, or with llm-compressor"
        )
    model, config = empty_model(checkpoint)
    plan = plan_of(model, config)
    check_weight_bits(plan)
    if plan.prefix:
        raise ValueError(
            f"the checkpoint keeps {len(plan.prefix)} prefix tokens in its cache; {TARGET} has no place for them, and "
            "its static ranges do not hold those tokens in a text: quantize with prefix=False for this target"
        )
    skeleton(model, plan)
    reader = TensorReader(checkpoint)
    check_files(model, map(str, reader.files), config.to_dict(), sentinel_key(plan))
    _check_encodings(plan, reader)
    schemes = choose_schemes(plan, all_inputs=options.all_inputs)
    total = write_weights(out, list(_entries(_Checkpoint(model, plan, reader), schemes)))
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in _COPIED and file.name not in _NOT_COPIED:
            shutil.copyfile(file, out / file.name)
    # config.json comes last: without it no reader takes an interrupted result for a model.
    architecture = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture |= {"dtype": "float32", "quantization_config": quantization_config(plan, schemes)}
    write_json(out / "config.json", architecture)
    return ExportResult.of(TARGET, out, _summary(plan, schemes, total))


def _check_encodings(plan: Plan, reader: TensorReader) -> None:
    for key in sorted(key for key in reader.keys if key.endswith((".scale", "._scale"))):
        scale = reader.read(key)
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{key} in the checkpoint is not finite and positive; the file is damaged")
    for name, spec in plan.activations.items():
        if not spec.grid.qmin <= (code := int(reader.read(f"{name}.zero_point"))) <= spec.grid.qmax:
            raise ValueError(f"{name}.zero_point in the checkpoint is {code}, off its grid; the file is damaged")


@dataclass(frozen=True)
class _Checkpoint:
    """The source: a model without values, its plan, and the files that hold the values."""

    model: Any
    plan: Plan
    reader: TensorReader

    def weight(self, path: str) -> QWeight:
        """The integers of one module, in memory until the caller drops them."""
        empty: QWeight = self.model.get_submodule(path).weight
        weight = QWeight.empty(empty.shape, empty.rule, "meta")
        weight.load_state_dict(self.reader.below(f"{path}.weight"), assign=True)
        return weight

    def values(self, path: str, offset: float = 0.0) -> Iterator[Tensor]:
        """float32 values of a weight, in pieces."""
        weight = self.weight(path)
        if len(weight.shape) == 1:
            yield weight() - offset
            return
        step = max(1, _CHUNK_BYTES // (4 * weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            yield weight.rows(torch.arange(start, min(start + step, weight.shape[0])))


def _entries(source: _Checkpoint, schemes: dict[str, Scheme]) -> Iterator[Entry]:
    plan, reader = source.plan, source.reader
    for path, spec in plan.weights.items():
        if path in schemes:
            yield from _projection(source, path, schemes[path])
        elif not (path == plan.family.head and plan.geometry.tied):
            shape = tuple(source.model.get_submodule(path).weight.shape)
            offset = plan.family.gain_offset if spec.role == "gain" else 0.0
            yield Entry(f"{path}.weight", torch.float32, shape, _later(source.values, path, offset))
        if (bias := f"{path}.bias") in reader.keys:
            yield _read(reader, bias, bias, torch.float32, reader.shape(bias))


def _projection(source: _Checkpoint, path: str, scheme: Scheme) -> Iterator[Entry]:
    rows, columns = source.model.get_submodule(path).weight.shape

    def codes() -> Iterator[Tensor]:
        values = source.weight(path).codes
        yield pack(values, scheme.bits) if scheme.packed else values

    if scheme.packed:
        yield Entry(f"{path}.weight_packed", torch.int32, (rows, _words(columns, scheme.bits)), codes)
        yield Entry(f"{path}.weight_shape", torch.int64, (2,), lambda: [torch.tensor([rows, columns])])
    else:
        yield Entry(f"{path}.weight", torch.int8, (rows, columns), codes)
    yield _read(source.reader, f"{path}.weight_scale", f"{path}.weight._scale", torch.float32, (rows, 1))
    if not scheme.symmetric:
        zero_points = f"{path}.weight_zero_point"
        yield Entry(zero_points, torch.int8, (rows, 1), lambda: [source.weight(path).zero_point.to(torch.int8)])
    if scheme.input_bits is None:
        return
    dtype, middle = torch.int8 if scheme.input_bits == 8 else torch.int16, 2 ** (scheme.input_bits - 1)
    name = input_of(source.plan, path)
    yield _read(source.reader, f"{path}.input_scale", f"{name}.scale", torch.float32, (1,))
    # The same steps on the signed grid.
    yield Entry(
        f"{path}.input_zero_point",
        dtype,
        (1,),
        lambda: [(source.reader.read(f"{name}.zero_point") - middle).to(dtype).view(1)],
    )


def _read(reader: TensorReader, name: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
    """A tensor that is copied as it is."""
    return Entry(name, dtype, shape, lambda: [reader.read(key).to(dtype).view(shape)])


def _later(function: Callable[..., Iterator[Tensor]], *arguments: Any) -> Callable[[], Iterator[Tensor]]:
    return lambda: function(*arguments)


def _words(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes side by side in int32 words, the first in the lowest bits, offset to be unsigned.

    Args:
        codes: integers ``[rows, columns]``. bits: 4 or 8.

    Returns:
        int32 ``[rows, ceil(columns * bits / 32)]``; what is left of a row's last word is 0.
    """
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    missing = _words(codes.shape[1], bits) * (32 // bits) - codes.shape[1]
    unsigned = torch.nn.functional.pad(unsigned, (0, missing))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.flatten().view(torch.int32).view(len(codes), -1)


def _summary(plan: Plan, schemes: dict[str, Scheme], total: int) -> dict[str, Any]:
    static = sum(scheme.input_bits is not None for scheme in schemes.values())
    if left := unserved(plan, schemes):
        logger.warning(
            "vLLM has no kernel for %d of %d projections, among them %s (asymmetric weights, static inputs of other "
            "than 8-bit weights, or unlike bits in layers that it fuses): this checkpoint is for transformers",
            len(left),
            len(schemes),
            left[0],
        )
    elif static < len(schemes):
        logger.warning(
            "%d of %d projections are written without the static encoding of their input, since vLLM has no kernel "
            "for their bits; the option all_inputs writes it, for transformers",
            len(schemes) - static,
            len(schemes),
        )
    return {
        "projections": len(schemes),
        "static_inputs": static,
        "for_vllm": not left,
        "formats": sorted({scheme.format for scheme in schemes.values()}),
        "float_tensors": len(plan.weights) - len(schemes) - int(plan.geometry.tied),
        "bytes": total,
    }
