"""Linear layers with 4-bit weights and floating-point activations (W4A16): ``prepare_weight_only`` and its operator.

No integer activations, so no static ranges: not a form for phone NPUs, but for GPUs, and for text from a checkpoint
whose activations are not to be rounded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .gpu import device as gpu_device
from .gpu import layout
from .gpu.workspace import workspace_of
from .registry import VARIABLE, unavailable

DECODES = ("int4", "e0m4")
BACKENDS = ("triton", "simulate")
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightOnlyLinear:
    """What :func:`prepare_weight_only` made of a layer. Call it with activations.

    Args:
        weight: int8 ``[blocks, out (padded), block / 2]``, :func:`~.gpu.layout.pack_unsigned_nibbles`.
        scale, offset: float32 ``[groups, out (padded)]``; a weight is ``scale * decoded + offset``.
        bias: float32 ``[out]`` or None.
        reason: why the GPU kernels are not used, or None.
    """

    weight: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    decode: str
    backend: str
    reason: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 or float16 ``[..., in]`` -> ``[..., out]`` in that dtype.

        Raises:
            ValueError: other dtype, width or device.
        """
        out: Tensor = torch.ops.mobilequant.linear_w4_real(*self.arguments(x))
        return out

    def arguments(self, x: Tensor) -> tuple[object, ...]:
        """The arguments of the operator ``torch.ops.mobilequant.linear_w4_real`` for an input."""
        tensors = (x, self.weight, self.scale, self.offset, self.bias)
        return (*tensors, self.in_features, self.out_features, self.decode, self.backend)


def prepare_weight_only(
    codes: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
    decode: str = "int4",
    backend: str | None = None,
) -> WeightOnlyLinear:
    """Pack a layer whose weight is ``scale * (codes - zero_point)``.

    Args:
        codes: int8 ``[out, in]`` in [-8, 7].
        scale: float ``[out]``, or ``[out, groups]`` with ``groups = ceil(in / group)``. zero_point: integers of that
            shape, or None if all are 0.
        bias: float ``[out]`` or None.
        group: columns that share a scale: 32, 64 or 128; 0: all of them.
        decode: ``"int4"`` or ``"e0m4"``, two ways to the same values (:mod:`.gpu.nibbles`).
        backend: ``"triton"`` or ``"simulate"`` (the dequantized weight in float32); None for MOBILEQUANT_BACKEND, or
            else the first that runs.

    Raises:
        ValueError: shapes, dtypes or codes that do not fit together, or a backend that cannot run.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8 or 0 in codes.shape:
        raise ValueError(f"codes are int8 [out, in], not {codes.dtype} {list(codes.shape)}")
    if int(codes.min()) < -8 or int(codes.max()) > 7:
        raise ValueError("4-bit codes lie in [-8, 7]; are these 8-bit codes?")
    if decode not in DECODES:
        raise ValueError(f"decode is {' or '.join(DECODES)}, not {decode!r}")
    if group and group not in layout.GROUPS:
        raise ValueError(f"a group has {', '.join(map(str, layout.GROUPS))} columns, or 0 for all, not {group}")
    out_features, in_features = codes.shape
    groups = -(-in_features // group) if group else 1
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.numel() != out_features * groups:
            raise ValueError(f"{name} has {tensor.numel()} elements for {out_features} channels of {groups} groups")
    if bias is not None and bias.numel() != out_features:
        raise ValueError(f"bias has {bias.numel()} elements for {out_features} output features")
    chosen, reason = _choose(backend, codes.device)
    step = scale.detach().float().reshape(out_features, groups)
    zero = None if zero_point is None else zero_point.float().reshape(out_features, groups)
    offset: Tensor | None
    if decode == "e0m4":
        offset = -step * (24 + (0 if zero is None else zero))
        step = 16 * step
    else:
        offset = None if zero is None else -step * zero
    if chosen == "triton":
        workspace_of(codes.device)  # made now: a CUDA graph may be captured before the layer is called
    return WeightOnlyLinear(
        layout.pack_unsigned_nibbles(codes, group=group), _per_group(step, in_features, group),
        None if offset is None else _per_group(offset, in_features, group),
        None if bias is None else bias.detach().float().reshape(-1),
        in_features, out_features, decode, chosen, reason,
    )  # fmt: skip


def _per_group(values: Tensor, in_features: int, group: int) -> Tensor:
    if group:
        return layout.pack_groups(values, in_features, group)
    return F.pad(values.t(), (0, layout.padded(len(values), layout.ROWS) - len(values))).contiguous()


def _choose(backend: str | None, device: torch.device) -> tuple[str, str | None]:
    wanted = backend or os.environ.get(VARIABLE)
    if wanted and wanted not in BACKENDS:
        raise ValueError(f"4-bit weights with float activations run by {' or '.join(BACKENDS)}, not {wanted!r}")
    reason = None
    if device.type != "cuda" and not (device.type == "cpu" and gpu_device.interpreted()):
        reason = "it computes on NVIDIA GPUs"
    reason = reason or unavailable("triton")
    if wanted == "triton" and reason:
        raise ValueError(f"kernel backend 'triton' cannot run this layer: {reason}")
    return wanted or ("simulate" if reason else "triton"), reason


def dequantized(
    weight: Tensor, scale: Tensor, offset: Tensor | None, in_features: int, out_features: int, decode: str
) -> Tensor:
    """float32 ``[out, in]`` of the packed tensors of a :class:`WeightOnlyLinear`."""
    codes = layout.unpack_nibbles(weight, out_features, in_features, unsigned=True).float()
    values = 1 + (codes + 8) / 16 if decode == "e0m4" else codes
    width = weight.shape[2] if len(scale) > 1 else in_features
    wide = scale.repeat_interleave(width, 0)[:in_features, :out_features].t()
    found = values * wide
    return found if offset is None else found + offset.repeat_interleave(width, 0)[:in_features, :out_features].t()


_SCHEMA = (
    "linear_w4_real(Tensor x, Tensor weight, Tensor scale, Tensor? offset, Tensor? bias, int in_features, "
    "int out_features, str decode, str backend) -> Tensor"
)


def _check(x: Tensor, weight: Tensor, in_features: int) -> None:
    if x.device != weight.device:
        raise ValueError(f"the layer was packed on {weight.device}, and its input lies on {x.device}")
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"the layer takes bfloat16 or float16 of shape [..., {in_features}], not {x.dtype} {list(x.shape)}"
        )


def _run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    decode: str,
    backend: str,
) -> Tensor:
    _check(x, weight, in_features)
    if backend == "triton":
        from .gpu.real_linear import real_linear

        out = real_linear(x, weight, scale, offset, bias, out_features, decode == "e0m4")
    else:
        wide = dequantized(weight, scale, offset, in_features, out_features, decode)
        out = F.linear(x.float(), wide, bias).to(x.dtype)
    return out.view(*x.shape[:-1], out_features)


def _shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    decode: str,
    backend: str,
) -> Tensor:
    _check(x, weight, in_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _register() -> torch.library.Library:
    library = torch.library.Library("mobilequant", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("linear_w4_real", _run, "CompositeExplicitAutograd")
    torch.library.register_fake("mobilequant::linear_w4_real", _shape, lib=library)
    return library


_LIBRARY = _register()  # the operator lives as long as this object
