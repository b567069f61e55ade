"""Fine-tuning of a rounded student: scales, ranges, norm gains and biases, and with a rank the weights as well.

With ``rank=None`` the integers of all matrices stay what they are; what moves is what multiplies or shifts them.
With ``rank=0`` every weight gets an offset inside its rounding, ``round(c + D)``: quantization-aware training for the
memory of learned rounding. With a higher rank the offsets are low-rank products ``A B`` (LR-QAT, Bondarenko et al.
2024), for the memory of two thin matrices. Of neither anything is left at run time.

LR-QAT starts from the float weight W / s. Here c is the integer that the rounding stage chose: many of its weights lie
at the border of two codes, where the first noisy step would flip them; from the middle of a code only gradients that
agree over many steps move it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn.modules import QuantLinear, QuantNorm
from ..nn.tunable import LogScale, LowRank, TunableBias, TunableWeight
from .parameters import Learnables

# A row's scale, and a norm's gain, may move by these factors.
_MAX_LOG_GAIN = 0.1
_MAX_LOG_NORM = 0.5


class Finetune(nn.Module):
    """Parameters of the last tuning stage, attached to a student whose transforms and rounding are final.

    Args:
        learnables: of the tuning stage; its ranges go on being learned here.
        rank: of the offsets of the projections; 0 gives each weight its own, None fixes the integers.
        seed: of the start of the offsets' right factors; the left ones start at 0, so that nothing changes at first.

    Attributes:
        left, right: by projection, ``[out, rank]`` and ``[rank, in]``; empty without a rank.
        offsets: by projection, ``[out, in]``, with ``rank=0``.
        gains: by projection, ``[out, 1]``, logarithm of a change of the row's scale.
        norms: by norm, ``[n]``, logarithm of a change of its gain.
        biases: by module with a bias, ``[n]``, in 255ths of the range of the module's output.
        ranges: as in :class:`.parameters.Learnables`.
    """

    def __init__(self, student: nn.Module, learnables: Learnables, *, rank: int | None = None, seed: int = 0):
        super().__init__()
        object.__setattr__(self, "learnables", learnables)  # not a submodule: its transforms and clips are final
        self.ranges = learnables.ranges
        self.left = nn.ParameterDict()
        self.right = nn.ParameterDict()
        self.offsets = nn.ParameterDict()
        self.gains = nn.ParameterDict()
        self.norms = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for name, weight in learnables.projections():
            key = _key(name)
            weight.freeze(codes=True)
            device = weight.source.device
            rows, columns = weight.shape
            self.gains[key] = nn.Parameter(torch.zeros(rows, 1, device=device))
            weight.gain_log = self.gains[key]
            if rank == 0:
                self.offsets[key] = nn.Parameter(torch.zeros(rows, columns, device=device))
                weight.offset_steps = self.offsets[key]
            elif rank is not None:
                self.left[key] = nn.Parameter(torch.zeros(rows, rank, device=device))
                self.right[key] = nn.Parameter(torch.randn(rank, columns, generator=generator).to(device))
                weight.low_rank = LowRank(self.left[key], self.right[key], 1.0)
        for name, module in student.named_modules():
            if isinstance(module, QuantNorm) and isinstance(module.weight, TunableWeight):
                theta = nn.Parameter(torch.zeros(module.weight.shape, device=module.weight.source.device))
                self.norms[_key(name)] = theta
                module.weight.rows_log.append(LogScale(theta, 1, None))
            if isinstance(module, QuantLinear | QuantNorm) and isinstance(module.bias, TunableBias):
                unit = module.output.scale.clone() * (module.output.spec.grid.qmax / 255)
                steps = nn.Parameter(torch.zeros_like(module.bias.source, dtype=torch.float32))
                self.biases[_key(name)] = steps
                module.bias.shift = _Shift(steps, unit)

    learnables: Learnables

    def bind(self, student: nn.Module) -> None:
        self.learnables.bind(student)

    def release(self, student: nn.Module) -> None:
        self.learnables.release(student)

    def groups(self, rates: Mapping[str, float], prefix: str = "") -> list[dict[str, object]]:
        """Optimizer groups of the parts (adapters, offsets, gains, norms, biases, ranges) with a rate above 0."""
        parts = {
            "adapters": [*self.left.values(), *self.right.values()],
            "offsets": list(self.offsets.values()),
            "gains": list(self.gains.values()),
            "norms": list(self.norms.values()),
            "biases": list(self.biases.values()),
            "ranges": [self.ranges] if self.ranges.numel() else [],
        }
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(rates[name] > 0)
        return [{"params": p, "lr": rates[n], "name": n} for n, p in parts.items() if p and rates[n] > 0]

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the factors within their bounds after a step."""
        for gain in self.gains.values():
            gain.clamp_(-_MAX_LOG_GAIN, _MAX_LOG_GAIN)
        for theta in self.norms.values():
            theta.clamp_(-_MAX_LOG_NORM, _MAX_LOG_NORM)


class _Shift:
    """What is added to a bias: learned steps of a fixed unit."""

    def __init__(self, steps: nn.Parameter, unit: Tensor):
        self.steps = steps
        self.unit = unit

    def __call__(self) -> Tensor:
        return self.steps * self.unit


def _key(name: str) -> str:
    return name.replace(".", "/")  # parameter names may not hold dots
