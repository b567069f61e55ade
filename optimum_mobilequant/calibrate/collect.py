"""Observe every activation of the model while it reads the calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from ..log import progress_bar
from ..nn import Mode, quantizers_of, set_mode
from ..plan import ActivationSpec

# Values kept of each 8-bit activation for the range search: an even sample, and exactly the extremes of the largest
# token vectors. A sample alone misses the few huge values of first tokens, and a range that cuts those ruins the
# model.
SAMPLE = 1 << 14
TAIL = 128
_PER_CHANNEL_ROLES = {"norm", "product", "context", "query_rotated", "key_rotated"}


@dataclass
class Statistics:
    """What was seen, by quantizer name.

    Args:
        low, high: 0-dim float32 extremes.
        sample: float32 ``[2, n]`` of the 8-bit activations: values, and the number of elements each stands for.
        channel_absmax: float32 ``[channels]`` of the activations that transforms divide.
        channel_ends: float32 ``[2, channels]``, lowest and highest values of these.
    """

    low: dict[str, Tensor]
    high: dict[str, Tensor]
    sample: dict[str, Tensor]
    channel_absmax: dict[str, Tensor]
    channel_ends: dict[str, Tensor] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat, for a stage file."""
        return {f"{kind}/{name}": t.contiguous() for kind, part in vars(self).items() for name, t in part.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Statistics:
        parts: dict[str, dict[str, Tensor]] = {f.name: {} for f in fields(cls)}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            parts[kind][name] = tensor
        return cls(**parts)


class _Observer:
    def __init__(self, spec: ActivationSpec, batches: int):
        self.low = self.high = torch.tensor(0.0)
        self.absmax: Tensor | None = None
        self.ends: Tensor | None = None
        self.role = spec.role
        self.keep = max(1, SAMPLE // batches) if spec.bits <= 8 else 0
        self.kept: list[Tensor] = []

    def flat_heads(self, x: Tensor) -> Tensor:
        """``[..., channels]`` with channels = heads * head_dim: attention tensors arrive with their heads apart."""
        if x.ndim != 4:
            return x
        return x.flatten(2) if self.role == "context" else x.transpose(1, 2).flatten(2)

    def update(self, x: Tensor) -> None:
        x = x.float()
        low, high = torch.aminmax(x)
        self.low, self.high = (
            torch.minimum(self.low.to(low.device), low),
            torch.maximum(self.high.to(high.device), high),
        )
        if self.keep:
            self.kept.append(self.sample(x).cpu())
        if self.role in _PER_CHANNEL_ROLES:
            rows = self.flat_heads(x).flatten(0, -2)
            channels = rows.abs().amax(0)
            self.absmax = channels if self.absmax is None else torch.maximum(self.absmax, channels)
            lowest, highest = rows.amin(0), rows.amax(0)
            if self.ends is not None:
                lowest, highest = torch.minimum(self.ends[0], lowest), torch.maximum(self.ends[1], highest)
            self.ends = torch.stack([lowest, highest])

    def sample(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        body = flat[:: max(1, flat.numel() // self.keep)][: self.keep]
        vectors = x.reshape(-1, x.shape[-1])
        size = min(TAIL, len(vectors))
        tails = torch.cat([vectors.amax(1).topk(size).values, vectors.amin(1).topk(size, largest=False).values])
        weights = torch.cat([torch.full_like(body, flat.numel() / len(body)), torch.ones_like(tails)])
        return torch.stack([torch.cat([body, tails]), weights])


@torch.no_grad()
def collect(student: nn.Module, ids: Tensor, *, batch_size: int, description: str = "calibrate") -> Statistics:
    """Run the float computation of ``student`` over ``ids`` and record every activation.

    Args:
        student: swapped model; transforms that are attached act, nothing is rounded.
        ids: int64 ``[sequences, length]``.

    Raises:
        ValueError: an activation is not finite; names the first such tensor in the data flow.
    """
    batches = ids.split(batch_size)
    observers: dict[str, _Observer] = {}
    for quantizer in quantizers_of(student):
        quantizer.observer = _Observer(quantizer.spec, len(batches))
        observers[quantizer.spec.name] = quantizer.observer
    set_mode(student, Mode.OBSERVE)
    device = next(student.buffers()).device
    try:
        for batch in progress_bar(batches, description, unit="batch"):
            student(input_ids=batch.to(device), use_cache=False)
            for name, observer in observers.items():
                if not (torch.isfinite(observer.low) and torch.isfinite(observer.high)):
                    raise ValueError(
                        f"activation {name} is not finite on the calibration text: the float model overflows "
                        f"(check its weights, or load it with dtype=torch.float32)"
                    )
    finally:
        for quantizer in quantizers_of(student):
            quantizer.observer = None
        set_mode(student, Mode.QUANTIZE)
    return Statistics(
        low={n: o.low.cpu() for n, o in observers.items()},
        high={n: o.high.cpu() for n, o in observers.items()},
        sample={n: torch.cat(o.kept, dim=1) for n, o in observers.items() if o.kept},
        channel_absmax={n: o.absmax.cpu() for n, o in observers.items() if o.absmax is not None},
        channel_ends={n: o.ends.cpu() for n, o in observers.items() if o.ends is not None},
    )
