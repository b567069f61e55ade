"""Learned rounding: which way each weight goes, once the transforms are fixed.

An offset is added to every weight, in steps of its grid, before it is rounded; offsets in [-1/2, 1/2] choose between
the two neighbours (SignRound, Cheng et al. 2023; AdaRound, Nagel et al. 2020), wider ones re-train the weight on its
grid. Here the offsets of all layers are trained together, against the same objective as the transforms and with the
activation ranges. Transforms and rounding are never trained at once: a transform moves the grid under the offsets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .parameters import Learnables

# A row's scale may move by this factor while its offsets are learned.
_MAX_LOG_GAIN = 0.1


class Rounding(nn.Module):
    """Offsets and row gains of the projections of a student whose transforms are final.

    Args:
        learnables: of the tuning stage; its ranges go on being learned here.
        limit: offsets stay within [-limit, limit] steps.
    """

    def __init__(self, student: nn.Module, learnables: Learnables, *, limit: float = 0.5):
        super().__init__()
        object.__setattr__(self, "learnables", learnables)  # not a submodule: its transforms and clips are final
        self.limit = limit
        learnables.matrices.requires_grad_(False)
        self.ranges = learnables.ranges
        self.offsets = nn.ParameterDict()
        self.gains = nn.ParameterDict()
        for name, weight in learnables.projections():
            key = name.replace(".", "/")
            weight.freeze()
            self.offsets[key] = nn.Parameter(torch.zeros(weight.shape, device=weight.source.device))
            self.gains[key] = nn.Parameter(torch.zeros(weight.shape[0], 1, device=weight.source.device))
            weight.offset_steps, weight.gain_log = self.offsets[key], self.gains[key]

    learnables: Learnables

    def bind(self, student: nn.Module) -> None:
        self.learnables.bind(student)

    def release(self, student: nn.Module) -> None:
        self.learnables.release(student)

    def groups(self, rates: Mapping[str, float], prefix: str = "") -> list[dict[str, object]]:
        parts = {
            "offsets": list(self.offsets.values()),
            "gains": list(self.gains.values()),
            "ranges": [self.ranges] if self.ranges.numel() else [],
        }
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(rates[name] > 0)
        return [{"params": p, "lr": rates[n], "name": n} for n, p in parts.items() if p and rates[n] > 0]

    @torch.no_grad()
    def clamp(self) -> None:
        for offset in self.offsets.values():
            offset.clamp_(-self.limit, self.limit)
        for gain in self.gains.values():
            gain.clamp_(-_MAX_LOG_GAIN, _MAX_LOG_GAIN)
