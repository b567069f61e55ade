"""Weights of the student: the model's own float tensors, rescaled and rounded on the fly with gradients.

Nothing is copied: the source tensor is shared with the teacher, and transforms act when the weight is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..numerics import dequantize, fake_quantize_offset, fake_quantize_weight, quantize, weight_qparams
from ..numerics.fake_weight import clipped_range, rescale
from ..numerics.groups import fake_quantize_groups, group_units, spread, two_levels
from ..plan import WeightRule, WeightSpec
from .matrix import MatrixUse
from .quantizer import Mode


@dataclass(frozen=True)
class LogScale:
    """A log-scale that an equivalent transform contributes along one dimension of a tensor.

    ``sign * theta[index]``; ``index`` spreads shared elements (KV groups, rotary pairs), None for the identity.
    """

    theta: nn.Parameter
    sign: int
    index: Tensor | None

    def __call__(self) -> Tensor:
        log = self.theta if self.index is None else self.theta[self.index]
        return log if self.sign > 0 else -log


def total(scales: list[LogScale]) -> Tensor | None:
    """Sum of the contributions along one dimension, or None."""
    out: Tensor | None = None
    for scale in scales:
        out = scale() if out is None else out + scale()
    return out


class LowRank(nn.Module):
    """Offset of a weight in steps of its grid, ``scale * left @ right`` (LR-QAT, Bondarenko et al. 2024).

    Args:
        left: ``[out, rank]``. right: ``[rank, in]``.
    """

    def __init__(self, left: nn.Parameter, right: nn.Parameter, scale: float):
        super().__init__()
        self.left = left
        self.right = right
        self.scale = scale

    def forward(self) -> Tensor:
        return self.scale * (self.left @ self.right)


class TunableWeight(nn.Module):
    """Weight or norm gain that is rescaled by transforms, clipped and rounded each time it is used.

    Order: offset, folded gain, matrices, log-scales, clipping, rounding.

    Args:
        source: float ``[out, in]`` or ``[n]``, shared, never written.
        spec: role and grid.
        offset: added to the source first (Gemma's zero-centred gains).

    Attributes:
        gain: float32 ``[in]``, of the norm before this weight, once moved here (``transform.matrices``); or None.
        is_one: this is a norm gain that has moved away; it starts from ones.
    """

    source: Tensor

    def __init__(self, source: Tensor, spec: WeightSpec, *, offset: float = 0.0):
        super().__init__()
        object.__setattr__(self, "source", source)  # not a parameter: it must not move, be cast or be saved here
        self.spec = spec
        self.offset = offset
        self.gain: Tensor | None = None
        self.is_one = False
        self.matrices: list[MatrixUse] = []
        self._mixed: tuple[tuple[tuple[int, ...], ...], Tensor] | None = None
        self.rows_log: list[LogScale] = []
        self.columns_log: list[LogScale] = []
        self.clip: nn.Parameter | None = None
        self.mode = Mode.QUANTIZE
        self._kept: Tensor | None = None
        # Learned rounding and fine-tuning, once the transforms are final: see freeze().
        self._base: tuple[Tensor, Tensor, Tensor] | None = None
        self._multiplier: Tensor | None = None
        self.offset_steps: nn.Parameter | None = None
        self.low_rank: LowRank | None = None
        self.gain_log: nn.Parameter | None = None

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def original(self, dtype: torch.dtype) -> Tensor:
        """What the float model multiplies with: the source and its offset."""
        source = self.source.to(dtype)
        return source + self.offset if self.offset else source

    def _float(self) -> Tensor:
        if not self.matrices:
            return self._gained(torch.float32)
        if not all(use.matrix.fixed for use in self.matrices):
            return self._multiplied()
        stamp = tuple(use.matrix.stamp for use in self.matrices)
        if self._mixed is None or self._mixed[0] != stamp:  # nothing here changes from step to step
            with torch.no_grad():
                self._mixed = (stamp, self._multiplied())
        return self._mixed[1]

    def _gained(self, dtype: torch.dtype) -> Tensor:
        if self.is_one:
            return torch.ones_like(self.source, dtype=dtype)
        out = self.original(dtype)
        return out if self.gain is None else out * self.gain.to(dtype)

    def _multiplied(self, *, exact: bool = False) -> Tensor:
        out = self._gained(torch.float64 if exact else torch.float32)
        for use in self.matrices:
            out = use(out, exact=exact)
        return out

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.mode in (Mode.OFF, Mode.OBSERVE):
            return rescale(self._float(), total(self.rows_log), total(self.columns_log)).to(dtype)
        offset = None if self._base is None else self._offset()
        if self._base is not None and offset is not None and self.gain_log is not None:
            base, scale, zero_point = self._base
            step, grid = self.step(scale), self.spec.grid
            return fake_quantize_offset(base, step, zero_point, offset, self.gain_log, grid).to(dtype)
        if self._base is not None and self.gain_log is not None:  # fixed integers, learned scales
            codes, _, zero_point = self.codes()
            return dequantize(codes, self.step(self._base[1]) * self.gain_log.exp(), zero_point).to(dtype)
        learns = self.rows_log or self.columns_log or self.clip is not None
        if self._base is not None or not (learns or any(not use.matrix.fixed for use in self.matrices)):
            if self._kept is None:  # nothing here changes from step to step
                codes, scale, zero_point = self.codes()
                self._kept = dequantize(codes, self.step(scale), zero_point)
            return self._kept.to(dtype)
        spec, rows, columns = self.spec, total(self.rows_log), total(self.columns_log)
        matrix = self._float()
        if matrix.ndim == 1:  # a gain: one row vector, transforms act along it
            matrix, rows, columns = matrix[None, :], None, rows
        if spec.rule.group:
            share = None if self.clip is None else torch.sigmoid(self.clip[:, 1:])
            scaled = rescale(matrix, rows, columns)
            return fake_quantize_groups(scaled, share, spec.grid, spec.rule.group).to(dtype)
        out = fake_quantize_weight(
            matrix, rows, columns, self.clip, spec.grid, symmetric=spec.rule.symmetric, per_channel=spec.per_channel
        )
        return out.view(self.shape).to(dtype)

    def carry_rows(self, x: Tensor) -> Tensor:
        """What the transforms at the rows make of a product ``[rows, n]`` that the untouched weight made."""
        for use in self.matrices:
            if use.dim == "rows":
                x = use(x)
        return rescale(x, total(self.rows_log), None)

    @torch.no_grad()
    def freeze(self, *, codes: bool = False) -> None:
        """Fix the folded weight, in steps of its scale, for its rounding to be chosen or its scales to be learned.

        A weight that is fixed already keeps what was learned of it: its offsets enter the fixed weight, its gains the
        scale.

        Args:
            codes: fix the integers themselves.
        """
        found, scale, zero_point = self.codes()
        multiplier = self.multiplier()
        base = self.folded() / self.step(scale, multiplier) if self._base is None else self._place()
        self.fix((found.to(torch.int32) - zero_point).float() if codes else base, scale, zero_point, multiplier)
        self.offset_steps = self.low_rank = self.gain_log = None

    @torch.no_grad()
    def fix(self, base: Tensor, scale: Tensor, zero_point: Tensor, multiplier: Tensor | None = None) -> None:
        """Take ``base``, in steps, in place of the weight: codes are ``round(base) + zero_point``.

        Args:
            base: float32 ``[out, in]``. scale: float32 ``[out, 1]``. zero_point: int32 ``[out, 1]``.
            multiplier: uint8 ``[out, groups]`` of a weight with groups.
        """
        self._base = (base, scale, zero_point)
        self._multiplier = multiplier
        self._kept = self._mixed = None

    def unfix(self) -> None:
        """Undo :meth:`fix`."""
        self._base = self._kept = self._multiplier = None

    def forget(self) -> None:
        """Drop what was computed from a source that is another now."""
        self._kept = self._mixed = None

    def _offset(self) -> Tensor | None:
        return self.offset_steps if self.low_rank is None else self.low_rank()

    def _place(self) -> Tensor:
        """The fixed weight with its offsets, in steps, before it is rounded."""
        assert self._base is not None
        offset = self._offset()
        return self._base[0] if offset is None else self._base[0] + offset

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, for an embedding."""
        return self.forward()[ids]

    @torch.no_grad()
    def folded(self) -> Tensor:
        """float32 weight with the transforms folded in (computed in float64), offset included."""
        log = [None if (t := total(part)) is None else t.double() for part in (self.rows_log, self.columns_log)]
        return rescale(self._multiplied(exact=True), *log).float()

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Signed codes, scale ``[out, 1]`` (or ``[1]`` for a gain) and zero point of the folded, clipped weight."""
        if self._base is not None:
            _, scale, zero_point = self._base
            codes = quantize(self._place(), torch.ones_like(scale), zero_point, self.spec.grid)
            return codes, scale if self.gain_log is None else scale * self.gain_log.exp(), zero_point
        folded = self.folded()
        scale, zero_point, multiplier = self.encode(folded, self.clip)
        return quantize(folded, self.step(scale, multiplier), zero_point, self.spec.grid), scale, zero_point

    @torch.no_grad()
    def encode(self, matrix: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale ``[out, 1]`` (``[1]`` for a gain), zero point and multiplier (None without groups) of a clipped
        ``matrix`` that takes the place of the folded weight."""
        rule, grid = self.spec.rule, self.spec.grid
        if rule.group:
            units = group_units(matrix, rule.group)
            ends = clipped_range(units, clip, symmetric=True, per_channel=True)
            scale, multiplier = two_levels(weight_qparams(*ends, grid, True)[0].view(len(matrix), -1))
            return scale, torch.zeros_like(scale, dtype=torch.int32), multiplier
        rows = matrix if matrix.ndim == 2 else matrix[None, :]
        ends = clipped_range(rows, clip, symmetric=rule.symmetric, per_channel=self.spec.per_channel)
        scale, zero_point = weight_qparams(*ends, grid, rule.symmetric)
        if matrix.ndim == 1:
            return scale.reshape(1), zero_point.reshape(1), None
        return scale.expand(len(matrix), 1).contiguous(), zero_point.expand(len(matrix), 1).contiguous(), None

    @torch.no_grad()
    def multiplier(self) -> Tensor | None:
        """uint8 ``[out, groups]`` of a weight with groups, else None."""
        if self._base is not None or not self.spec.rule.group:
            return self._multiplier
        return self.encode(self.folded(), self.clip)[2]

    def step(self, scale: Tensor, multiplier: Tensor | None = None) -> Tensor:
        """Size of a step for each weight, broadcastable to ``[out, in]``, from the row scales."""
        if not self.spec.rule.group:
            return scale
        multiplier = self.multiplier() if multiplier is None else multiplier
        assert multiplier is not None
        return scale * spread(multiplier, self.spec.rule.group, self.shape[1])

    @property
    def rule(self) -> WeightRule:
        return self.spec.rule


class TunableBias(nn.Module):
    """Bias ``[n]`` that follows the rows it belongs to; 32-bit on the device, so it is not rounded while tuning.

    Args:
        added: the float model has none here.

    Attributes:
        correction: ``[n]``, added while the model rounds; or None.
    """

    source: Tensor

    def __init__(self, source: Tensor, *, added: bool = False):
        super().__init__()
        object.__setattr__(self, "source", source)
        self.added = added
        self.correction: Tensor | None = None
        self.mode = Mode.QUANTIZE
        self.divisor: Tensor | None = None  # a LayerNorm's gain, once it has moved behind this bias
        self.matrices: list[MatrixUse] = []
        self.rows_log: list[LogScale] = []
        self.shift: Callable[[], Tensor] | None = None  # learned, added behind the transforms

    def _multiplied(self, dtype: torch.dtype, *, exact: bool = False) -> Tensor:
        out = self.source.to(dtype)
        if self.divisor is not None:
            out = out / self.divisor.to(dtype)
        for use in self.matrices:
            out = use(out, exact=exact)
        return out

    def forward(self) -> Tensor:
        out = rescale(self._multiplied(torch.float32), total(self.rows_log), None)
        if self.correction is not None and self.mode not in (Mode.OFF, Mode.OBSERVE):
            out = out + self.correction
        return out if self.shift is None else out + self.shift()

    @torch.no_grad()
    def folded(self) -> Tensor:
        """float32 bias with the transforms folded in (computed in float64), corrected."""
        log = total(self.rows_log)
        out = self._multiplied(torch.float64, exact=True)
        out = rescale(out, None if log is None else log.double(), None)
        out = (out if self.correction is None else out + self.correction).float()
        return out if self.shift is None else out + self.shift()
