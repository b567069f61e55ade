"""The groups of learned parameters: transforms (scales and matrices), weight clipping, activation ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Mode, Quantizer, quantizers_of, set_mode
from ..nn.formats import TunableFormat
from ..nn.matrix import Matrix
from ..nn.modules import QuantLinear
from ..nn.tunable import LogScale, TunableWeight
from ..numerics.adpq import CLIP_POWER, CLIP_SHARES, row_quantile
from ..numerics.fake import round_straight_through
from ..numerics.fake_weight import clipped_range
from ..numerics.groups import group_units
from ..numerics.qparams import (
    SMALLEST_RANGE,
    affine_qparams,
    affine_scale_and_offset,
    dequantize,
    quantize,
    weight_qparams,
)
from ..plan import Plan, WeightSpec
from ..transform import Edge

# Beyond e^4.6 = 100 a scale only trades one overflow for another.
MAX_LOG_SCALE = 4.6
_CLIPPED_ROLES = {"attention", "gate", "up", "down"}
# sigmoid(4) = 0.982: where OmniQuant and MobileQuant start their clipping logits.
DEFAULT_CLIP_LOGIT = 4.0


class Learnables(nn.Module):
    """Parameters of the tuning stage, attached to a student.

    Args:
        scales: ``theta`` of each edge, float32 ``[edge.size]``, natural logarithms.
        clips: logits for each clipped weight, ``[units, 2]`` (low, high).
        matrices: of each matrix edge, as :func:`.matrices.attach_matrices` made them; or None.
        ranges: ``[sites, 2]``, logarithmic change of the (low, high) end of each learned activation range: steps are
            relative, so that one learning rate serves an 8-bit scale of 0.1 and a 16-bit scale of 1e-5.
    """

    def __init__(
        self,
        student: nn.Module,
        plan: Plan,
        edges: Sequence[Edge],
        scales: Mapping[str, Tensor],
        matrices: Mapping[str, Matrix] | None = None,
    ):
        super().__init__()
        self.plan = plan
        self.edges = list(edges)
        self.scales = nn.ParameterDict({_key(e.name): nn.Parameter(scales[e.name].clone()) for e in edges})
        self.matrices = nn.ModuleDict({_key(name): matrix for name, matrix in (matrices or {}).items()})
        self.clips = nn.ParameterDict()
        self.ranges = nn.Parameter(torch.zeros(0, 2))
        self._weights: dict[str, TunableWeight] = {}
        self._sites: list[Quantizer] = []
        device = next(student.buffers()).device
        for edge in self.edges:
            theta = self.scales[_key(edge.name)]
            for effect in edge.effects:
                index = None if effect.index is None else effect.index.to(device)
                module: Any = student.get_submodule(effect.module)
                scale = LogScale(theta, effect.sign, index)
                if effect.dim == "columns":
                    module.weight.columns_log.append(scale)
                    continue
                module.weight.rows_log.append(scale)
                if module.bias is not None:
                    module.bias.rows_log.append(scale)
        for name, linear in student.named_modules():
            if isinstance(linear, QuantLinear) and isinstance(linear.weight, TunableWeight):
                self._weights[name] = linear.weight

    # -- weight clipping ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_clips(self, init: str) -> None:
        """Give every projection a clipping logit for each unit; ``init``: ``"mse"`` searches a grid, else constant."""
        for name, weight in self._weights.items():
            if weight.spec.role not in _CLIPPED_ROLES:
                continue
            if isinstance(weight, TunableFormat):  # no range of a row to clip; its groups can narrow theirs
                weight.search = init == "mse"
                continue
            make = {"mse": least_error_clip, "adpq": adaptive_lasso_clip}.get(init, _constant_clip)
            self.clips[_key(name)] = nn.Parameter(make(weight.folded(), weight.spec))
            weight.clip = self.clips[_key(name)]

    def projections(self) -> list[tuple[str, TunableWeight]]:
        """The weights whose rounding may be learned, by module path."""
        return [(name, weight) for name, weight in self._weights.items() if weight.spec.role in _CLIPPED_ROLES]

    # -- activation ranges ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_ranges(self, student: nn.Module, ranges: Mapping[str, tuple[Tensor, Tensor]], *, learn: bool) -> None:
        """Write the start ranges into the quantizers and, if ``learn``, make all but the known ones learnable.

        Score ranges stay as measured: their low end is set by what a hidden position needs.
        """
        self._sites = []
        for quantizer in quantizers_of(student):
            name = quantizer.spec.name
            if name in ranges:
                quantizer.set(*affine_qparams(*ranges[name], quantizer.spec.grid))
                if learn and quantizer.spec.role != "scores":
                    self._sites.append(quantizer)
        device = next(student.buffers()).device
        ends = [torch.stack(ranges[q.spec.name]).to(device) for q in self._sites]
        self.start = torch.stack(ends) if ends else torch.zeros(0, 2, device=device)
        self.steps = torch.tensor([float(q.spec.grid.qmax) for q in self._sites], device=device)
        self.ranges = nn.Parameter(torch.zeros(len(self._sites), 2, device=device))

    def bind(self, student: nn.Module) -> None:
        """Compute this step's matrices, and hand its scales and zero points to the quantizers: one vector computation
        for all sites."""
        set_mode(student, Mode.LEARN)
        for matrix in self._matrices():
            matrix.bind()
        if not self._sites:
            return
        low, high = (self.start * self.ranges.exp()).unbind(1)
        scale, offset = affine_scale_and_offset(low, high, 0, self.steps)
        zero_point = round_straight_through(offset).clamp(torch.zeros_like(self.steps), self.steps)
        for quantizer, s, z in zip(self._sites, scale.unbind(), zero_point.unbind(), strict=True):
            quantizer.learned = (s, z)

    @torch.no_grad()
    def release(self, student: nn.Module) -> None:
        """Write the learned encodings into the quantizers' buffers and stop learning."""
        self.bind(student)
        for quantizer in self._sites:
            assert quantizer.learned is not None
            quantizer.set(*quantizer.learned)
            quantizer.learned = None
        for matrix in self._matrices():
            matrix.release()
        set_mode(student, Mode.QUANTIZE)

    def _matrices(self) -> Iterator[Matrix]:
        yield from self.matrices.values()  # type: ignore[misc]

    # -- for the optimizer ----------------------------------------------------------------------------------------

    def groups(self, rates: Mapping[str, float], prefix: str = "") -> list[dict[str, object]]:
        """Optimizer groups of the parts (transforms, matrices, clips, ranges) with a rate above 0, limited to
        ``prefix``."""
        parts = {
            "transforms": [p for k, p in self.scales.items() if k.startswith(_key(prefix))],
            "matrices": [p for k, m in self.matrices.items() if k.startswith(_key(prefix)) for p in m.parameters()],
            "clips": [p for k, p in self.clips.items() if k.startswith(_key(prefix))],
            "ranges": [self.ranges] if self.ranges.numel() else [],
        }
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(rates[name] > 0)
        return [{"params": p, "lr": rates[n], "name": n} for n, p in parts.items() if p and rates[n] > 0]

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep log-scales and condition numbers within their bounds after a step."""
        for matrix in self._matrices():
            matrix.clamp()
        for theta in self.scales.values():
            theta.clamp_(-2 * MAX_LOG_SCALE, 2 * MAX_LOG_SCALE)


def _key(name: str) -> str:
    return name.replace(".", "/")  # parameter names may not hold dots


def encode_anew(weight: TunableWeight, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :meth:`.TunableWeight.encode` returns for a ``matrix`` that takes the place of what ``weight`` holds.

    A weight that was clipped is clipped anew, at the least squared error: its clipping is a share of the range it had.
    """
    return weight.encode(matrix, None if weight.clip is None else least_error_clip(matrix, weight.spec))


def _constant_clip(matrix: Tensor, spec: WeightSpec) -> Tensor:
    units = _units(matrix, spec)
    return torch.full((len(units), 2), DEFAULT_CLIP_LOGIT, device=matrix.device)


def _units(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """The weight with a row for each range."""
    if spec.rule.group:
        return group_units(matrix, spec.rule.group)
    return matrix if spec.per_channel else matrix.reshape(1, -1)


def least_error_clip(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """Logit of the share of each unit's range with the smallest rounding error, out of 0.5 ... 0.99.

    Args:
        matrix: float32 ``[out, in]``.

    Returns:
        float32 ``[units, 2]``.
    """
    units, symmetric = _units(matrix, spec), spec.rule.symmetric
    best_logit = _constant_clip(matrix, spec)
    best_error = torch.full((len(units), 1), float("inf"), device=matrix.device)
    for share in torch.linspace(0.5, 0.99, 50).tolist():
        logit = torch.full_like(best_logit, torch.logit(torch.tensor(share)).item())
        ends = clipped_range(units, logit, symmetric=symmetric, per_channel=True)
        scale, zero_point = weight_qparams(*ends, spec.grid, symmetric)
        rounded = dequantize(quantize(units, scale, zero_point, spec.grid), scale, zero_point)
        error = (rounded - units).square().mean(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_logit = torch.where(better, logit, best_logit)
    return best_logit


def adaptive_lasso_clip(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """As :func:`least_error_clip`, of the clips that cut off the outliers of an adaptive LASSO (AdpQ).

    A candidate is the largest magnitude of the unit that is no outlier at one of ``CLIP_SHARES``; the error has the
    power ``CLIP_POWER``. No data enters.
    """
    units, symmetric = _units(matrix, spec), spec.rule.symmetric
    high, low = units.amax(1, keepdim=True).clamp(min=0.0), -units.amin(1, keepdim=True).clamp(max=0.0)
    if symmetric:
        high = low = torch.maximum(high, low)
    best = _constant_clip(matrix, spec)
    best_error = torch.full((len(units), 1), float("inf"), device=matrix.device)
    for share in CLIP_SHARES:
        end = row_quantile(units, share)
        kept = torch.cat([end / low.clamp(min=SMALLEST_RANGE), end / high.clamp(min=SMALLEST_RANGE)], dim=1)
        logit = torch.logit(kept.clamp(1e-3, 1 - 1e-4))
        ends = clipped_range(units, logit, symmetric=symmetric, per_channel=True)
        scale, zero_point = weight_qparams(*ends, spec.grid, symmetric)
        rounded = dequantize(quantize(units, scale, zero_point, spec.grid), scale, zero_point)
        error = (rounded - units).abs().pow(CLIP_POWER).mean(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, logit, best)
    return best
