"""Checks of a saved checkpoint against the model it claims to be, before anything is loaded from it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..nn import Quantizer
from ..nn.formats import FormatWeight
from ..numerics.groups import MAX_MULTIPLIER

# Metadata key of the digest of what decides how integers are read.
DIGEST_KEY = "mobilequant_scheme"

_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
_INTEGERS = {"I8", "U8", "I16", "I32", "I64"}


def scheme_digest(config: Mapping[str, Any]) -> str:
    """Hash of the parts of a saved config that decide how the integers are read (scheme, overrides, family, format).

    Bits of an activation, or the symmetry of a weight, change what stored integers mean without changing their shapes;
    the digest in the weight file's header makes such an edit of ``config.json`` visible.
    """
    parts = {key: config.get(key) for key in ("scheme", "overrides", "family", "format_version")}
    if config.get("prefix"):
        parts["prefix"] = config["prefix"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_files(model: nn.Module, files: Iterable[str], config: Mapping[str, Any], sentinel: str) -> None:
    """Compare the headers of all shards with the tensors the prepared model expects.

    Args:
        model: skeleton with quantized modules, on any device.
        files: paths of the ``.safetensors`` shards.
        config: the checkpoint's quantization config as a dict.
        sentinel: the one key that is allowed beside the model's own.

    Raises:
        ValueError: a shard that is truncated or not safetensors, keys missing or unexpected, a shape or dtype that
            does not fit, or a config that is not the one the file was written with.
    """
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    digests: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is no safetensors file; optimum-mobilequant reads nothing else")
        try:
            with safe_open(file, framework="pt") as shard:
                digests |= {(shard.metadata() or {}).get(DIGEST_KEY, "")}
                for key in shard.keys():  # noqa: SIM118 (not a mapping)
                    part = shard.get_slice(key)
                    found[key] = (part.get_dtype(), tuple(part.get_shape()), Path(file).name)
        except (SafetensorError, OSError, struct.error) as error:
            raise ValueError(
                f"{file} is damaged or truncated ({error}); download or save the checkpoint again"
            ) from error
    found.pop(sentinel, None)
    expected = {k: (_DTYPES[v.dtype], tuple(v.shape)) for k, v in model.state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, among them {', '.join(missing[:4])}")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise ValueError(
            f"the checkpoint holds {len(unexpected)} tensors that its config does not provide for, among them "
            f"{', '.join(unexpected[:4])}; config.json and weights do not belong together"
        )
    for key, (dtype, shape) in expected.items():
        kind, size, name = found[key]
        # Float tensors are cast to what the model asks for; integers are never converted.
        if size != shape or (kind != dtype and (kind in _INTEGERS or dtype in _INTEGERS)):
            raise ValueError(f"{key} in {name} is {kind} {list(size)}, but the config asks for {dtype} {list(shape)}")
    if digests != {scheme_digest(config)}:
        raise ValueError(
            "the quantization scheme in config.json is not the one these weights were written with; restore the "
            "config.json that was saved with them"
        )


def check_values(model: nn.Module) -> None:
    """Refuse, after loading, scales that are not finite and positive and zero points off their grid.

    Raises:
        ValueError: names the tensor.
    """
    for name, buffer in model.named_buffers():
        is_scale = name.endswith((".scale", "._scale"))
        if is_scale and not (torch.isfinite(buffer).all() and (buffer > 0).all()):
            raise ValueError(f"{name} in the checkpoint is not finite and positive; the file is damaged")
        if name.endswith("._multiplier") and not ((buffer >= 1) & (buffer <= MAX_MULTIPLIER)).all():
            raise ValueError(f"{name} in the checkpoint is not within 1 to {MAX_MULTIPLIER}; the file is damaged")
    for name, module in model.named_modules():
        if isinstance(module, FormatWeight):
            for key, tensor in module.tensors().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{name}.{key} in the checkpoint is not finite; the file is damaged")
        if isinstance(module, Quantizer):
            zero_point, grid = int(module.zero_point), module.spec.grid
            if not grid.qmin <= zero_point <= grid.qmax:
                raise ValueError(
                    f"{name}.zero_point in the checkpoint is {zero_point}, outside {grid.qmin} to {grid.qmax}; "
                    "the file is damaged"
                )
