"""A plain optimum-quanto model as a graph: integer weights, everything else float.

Read is what ``optimum.quanto.QuantizedModelForCausalLM.save_pretrained`` writes: a transformers folder with quanto's
own keys in the safetensors files, and ``quanto_qmap.json``. Its integers map to encodings like this (quanto 0.2.7;
``g`` is the group size, by default 128 or less, or a whole row where the rows are short):

============================  ===========================================================================
``qint8``                     int8, symmetric, one scale a row: the same integers
``qint4``, integer ``_shift``  int4, zero point ``_shift - 8``, one scale a row or each ``g`` values: the same integers
``qint4``, float ``_shift``   ``x = scale * code - shift`` with a shift that is no whole number of steps
============================  ===========================================================================

The last is what quanto makes by default, and no integer zero point can say it. Rounding the shift to a whole number of
steps would be a different model (demo model: perplexity + 8 %), so such a weight is encoded anew with 8 bits,
symmetric, one scale a row (demo model: + 0.1 %, signal to noise of the weights 42 dB).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.reader import TensorReader
from ..families import family_of, geometry_of
from ..log import get_logger
from ..nn.swap import norm_eps
from ..numerics import Grid, dequantize, quantize, weight_qparams
from ..numerics.packing import unpack_int4
from ..numerics.qparams import SMALLEST_RANGE
from ..plan import PRESETS, Plan, build_plan
from .ir import Encoding
from .source import Constant

logger = get_logger(__name__)

QMAP = "quanto_qmap.json"
_BITS = {"qint8": 8, "qint4": 4}
# What replaces a linear's ``weight`` in the file.
_PARTS = {
    "qint8": ("weight._data", "weight._scale"),
    "qint4": ("weight._data._data", "weight._scale", "weight._shift"),
}
_UNUSED = ("input_scale", "output_scale")  # 1.0 in a model whose activations are floats


def read_qmap(folder: Path) -> dict[str, str]:
    """Linears that are quantized -> ``"qint8"`` or ``"qint4"``.

    Raises:
        ValueError: a damaged file, other weight types, or quantized activations.
    """
    try:
        stored = json.loads((folder / QMAP).read_text(encoding="utf-8"))
        weights = {name: entry["weights"] for name, entry in stored.items()}
        activations = {name: entry["activations"] for name, entry in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / QMAP} is damaged ({error!r}); save the quanto model again") from error
    if found := sorted(set(activations.values()) - {"none"}):
        raise ValueError(
            f"this quanto model has {', '.join(found)} activations: quanto keeps one scale for each layer's input and "
            "output, and none for the tensors between layers. Quantize it with weights only, or quantize the float "
            "model with optimum-mobilequant, which gives every tensor an encoding"
        )
    if found := sorted(set(weights.values()) - set(_BITS)):
        raise ValueError(
            f"this quanto model has {', '.join(found)} weights; read are {' and '.join(_BITS)}: quantize the float "
            "model with one of them"
        )
    return weights


def load_quanto(folder: Path) -> tuple[PreTrainedModel, Plan, QuantoSource]:
    """Read a saved quanto model.

    Returns:
        model: plain, float32, with the dequantized weights: what quanto computes; in eval mode.
        plan: names and roles of all tensors. Its bits mean nothing here: encodings are the graph's.
        source: the tensors, for :func:`~.build.build_graph`.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: an unsupported architecture or kind of quantization; damaged files; files that do not belong
            together.
    """
    kinds = read_qmap(folder)
    reader = TensorReader(folder)
    config = AutoConfig.from_pretrained(folder)
    model = _empty_model(config)
    family = family_of(model)
    if family.head in kinds and config.tie_word_embeddings:  # quantizing a tied head unties it
        config.tie_word_embeddings = False
        model = _empty_model(config)
    plan = build_plan(family, geometry_of(model, family), PRESETS["w8a16"])
    _check_keys(model, kinds, reader)
    source = QuantoSource(model, plan, kinds, reader)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        values = source.values(owner) if owner in kinds and leaf == "weight" else reader.read(name).float()
        if values.shape != parameter.shape:
            raise ValueError(f"{name} is {list(values.shape)} in the file, but {list(parameter.shape)} by config.json")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    if source.widened:
        logger.warning(
            "%d of %d weights are quanto's 4 bits with a float shift, which no integer zero point can express; they "
            "are encoded with 8 bits. For 4 bits, quantize with optimizer=functools.partial(MaxOptimizer(), "
            "zeropoint=True)",
            len(source.widened),
            len(kinds),
        )
    return model.eval(), plan, source


def _empty_model(config: Any) -> PreTrainedModel:
    with init_empty_weights():  # buffers, such as the rotary frequencies, are made for real
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # making parameters empty took the ties apart
    return model


def _check_keys(model: PreTrainedModel, kinds: dict[str, str], reader: TensorReader) -> None:
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(kinds.keys() - linears):
        raise ValueError(f"{QMAP} names {', '.join(unknown[:4])}, no linear layers of this model: save it again")
    expected = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in kinds}
    expected |= {f"{name}.{part}" for name, kind in kinds.items() for part in _PARTS[kind]}
    if missing := sorted(expected - reader.keys):
        raise ValueError(f"the quanto model lacks {len(missing)} tensors, among them {', '.join(missing[:4])}")
    unused = {f"{name}.{part}" for name in kinds for part in _UNUSED}
    if left := sorted(reader.keys - expected - unused):
        raise ValueError(
            f"the quanto model holds {len(left)} tensors that {QMAP} and config.json do not provide for, among them "
            f"{', '.join(left[:4])}: save it again"
        )


class QuantoSource:
    """The tensors of a quanto model: see :class:`~.source.TensorSource`.

    Args:
        model: of floats; may still be empty when this is made.
        kinds: linears that are quantized -> quanto's type.
    """

    def __init__(self, model: nn.Module, plan: Plan, kinds: dict[str, str], reader: TensorReader):
        self.model, self.plan, self.kinds, self.reader = model, plan, kinds, reader
        self.widened: set[str] = set()

    def activation(self, name: str) -> None:
        return None

    def weight(self, path: str) -> Constant:
        if path in self.kinds:
            return self._integers(path)
        module: Any = self.model.get_submodule(path)
        gain_offset = self.plan.family.gain_offset if self.plan.weights[path].role == "gain" else 0.0
        return Constant(tuple(module.weight.shape), None, lambda: module.weight.detach() + gain_offset)

    def bias(self, path: str, owner: str) -> Constant | None:
        bias = getattr(self.model.get_submodule(path), "bias", None)
        return None if bias is None else Constant(tuple(bias.shape), None, lambda: bias.detach())

    def key_shift(self, attention: str) -> Constant | None:
        return None

    def table(self) -> Constant:
        module: Any = self.model.get_submodule(self.plan.family.embedding)
        factor = float(getattr(module, "scalar_embed_scale", 1.0))
        return Constant(tuple(module.weight.shape), None, lambda: module.weight.detach()).scaled(factor)

    def norm(self, path: str) -> tuple[float, bool]:
        return norm_eps(self.model.get_submodule(path)), self.plan.family.norm_kind == "layer"

    def function(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def values(self, path: str) -> Tensor:
        """float32 ``[out, in]``: what quanto multiplies with."""
        parts, shape = self._parts(path), self._shape(path)
        scale, shift = parts["weight._scale"].float(), parts.get("weight._shift")
        if shift is None:
            values = dequantize(parts["weight._data"], scale, torch.zeros((), dtype=torch.int32))
        elif shift.is_floating_point():
            codes = unpack_int4(parts["weight._data._data"], scale.numel()).float() + 8
            values = (codes * scale - shift.float()).reshape(shape)
        else:
            codes = unpack_int4(parts["weight._data._data"], scale.numel())
            values = dequantize(codes, scale, shift.to(torch.int32) - 8).reshape(shape)
        if not torch.isfinite(values).all():
            raise ValueError(f"{path}.weight in the file is not finite; the file is damaged")
        if shift is not None and shift.is_floating_point():
            self.widened.add(path)
        return values

    def _integers(self, path: str) -> Constant:
        shape, parts = self._shape(path), self._parts(path)
        if path in self.widened:
            values = self.values(path)
            grid = Grid(8, signed=True)
            scale, zero = weight_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), grid, True)
            encoding = Encoding(scale.flatten(), zero.flatten(), grid)
            return Constant(shape, encoding, lambda: quantize(self.values(path), scale, zero, grid))
        grid = Grid(_BITS[self.kinds[path]], signed=True)
        # quanto gives a row of zeros, such as padding of the vocabulary, the scale 0.
        scale = parts["weight._scale"].float().clamp(min=SMALLEST_RANGE).view(shape[0], -1)
        shift = parts.get("weight._shift")
        zero = torch.zeros_like(scale, dtype=torch.int32) if shift is None else shift.to(torch.int32) - 8
        zero, blocks = zero.view(scale.shape), scale.shape[1]
        if blocks == 1:
            encoding = Encoding(scale.flatten(), zero.flatten(), grid)
        else:
            encoding = Encoding(scale, zero, grid, block_size=shape[1] // blocks)

        def codes() -> Tensor:
            if grid.bits == 8:
                return self.reader.read(f"{path}.weight._data")
            return unpack_int4(self.reader.read(f"{path}.weight._data._data"), scale.numel()).reshape(shape)

        return Constant(shape, encoding, codes)

    def _parts(self, path: str) -> dict[str, Tensor]:
        """The stored tensors of a weight, their shapes checked against the layer's."""
        parts = {part: self.reader.read(f"{path}.{part}") for part in _PARTS[self.kinds[path]]}
        (rows, columns), data = self._shape(path), parts[_PARTS[self.kinds[path]][0]]
        units = parts["weight._scale"].numel()
        if self.kinds[path] == "qint8":
            fits = tuple(data.shape) == (rows, columns) and units == rows and data.dtype == torch.int8
        else:
            width = columns // max(units // rows, 1)
            fits = units * width == rows * columns and tuple(data.shape) == ((units + 1) // 2, width)
            fits = fits and parts["weight._shift"].shape == parts["weight._scale"].shape and data.dtype == torch.uint8
        if not fits:
            raise ValueError(f"{path}.weight in the file does not fit a layer of {rows} x {columns}: save it again")
        return parts

    def _shape(self, path: str) -> tuple[int, int]:
        linear: Any = self.model.get_submodule(path)
        return int(linear.out_features), int(linear.in_features)
