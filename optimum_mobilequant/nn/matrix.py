"""Learnable invertible matrices that stay what they are: orthogonal, well conditioned, or turns of rotary pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Dense matrices keep their condition number below this: 16-bit and 8-bit grids pay for more on both sides.
MAX_CONDITION = 1e3


def cayley(skew: Tensor) -> Tensor:
    """Orthogonal ``(I + A)(I - A)^-1`` of ``A = (X - X^T) / 4``, ``[..., n, n]``: near 0 entries of X are angles.

    The Cayley transform (as in SpinQuant, Liu et al. 2025, there as a retraction): any X gives an exactly orthogonal
    matrix, so that an ordinary optimizer may move X freely.
    """
    a = (skew - skew.mT) / 4
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye - a, eye + a)  # the two factors commute


class Matrix(nn.Module):
    """One invertible matrix M for each block, with its inverse in closed form.

    ==============  ================================================  ====================================
    kind            M                                                 inverse
    ==============  ================================================  ====================================
    ``orthogonal``  cayley(X) start                                   transpose
    ``dense``       cayley(Y) diag(exp d) cayley(X) start, |d| small  transposes, diag(exp -d)
    ``plane``       turns of the pairs (i, i + rotary_dims / 2)       transpose
    ==============  ================================================  ====================================

    Args:
        start: ``[blocks, n, n]`` orthogonal. keeps_mean: skew matrices are projected so that ones stay in place.
    """

    def __init__(
        self, kind: str, start: Tensor, *, rotary_dims: int = 0, keeps_mean: bool = False, device: object = None
    ):
        super().__init__()
        self.kind, self.keeps_mean = kind, keeps_mean
        blocks, n, _ = start.shape
        start = start.to(device=device)  # type: ignore[call-overload]
        object.__setattr__(self, "start", start)  # float64 whatever the module is cast to, and not saved
        zeros = torch.zeros(blocks, n, n, device=start.device)
        if kind == "plane":
            self.angles = nn.Parameter(torch.zeros(blocks, rotary_dims // 2, device=start.device))
        else:
            self.right = nn.Parameter(zeros)
        if kind == "dense":
            self.left = nn.Parameter(zeros.clone())
            self.stretch = nn.Parameter(torch.zeros(blocks, n, device=start.device))
        self.bound: tuple[Tensor, Tensor] | None = None
        self._kept: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    start: Tensor

    @property
    def stamp(self) -> tuple[int, ...]:
        """Changes whenever a parameter is written."""
        return tuple(p._version for p in self.parameters())

    @property
    def fixed(self) -> bool:
        return not any(p.requires_grad for p in self.parameters())

    def compute(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """M and its inverse, ``[blocks, n, n]``."""
        start = self.start.to(dtype)
        if self.kind == "plane":
            turn = _turns(self.angles.to(dtype), start.shape[-1])
            return turn, turn.mT
        right = cayley(self._skew(self.right.to(dtype))) @ start
        if self.kind == "orthogonal":
            return right, right.mT
        left, stretch = cayley(self.left.to(dtype)), self.stretch.to(dtype)
        return (left * stretch.exp()[:, None, :]) @ right, right.mT @ (left * (-stretch).exp()[:, None, :]).mT

    def _skew(self, x: Tensor) -> Tensor:
        if not self.keeps_mean:
            return x
        a = x - x.mT
        a = a - a.mean(-1, keepdim=True)
        return (a - a.mean(-2, keepdim=True)) / 2

    def bind(self) -> None:
        """Compute M once for all that use it until :meth:`release`, with its graph where gradients are wanted."""
        self.bound = self._current() if self.fixed or not torch.is_grad_enabled() else self.compute(torch.float32)

    def release(self) -> None:
        self.bound = None

    def values(self) -> tuple[Tensor, Tensor]:
        """M and its inverse, float32: as bound, else as the parameters are now."""
        return self._current() if self.bound is None else self.bound

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor]:
        if self._kept is None or self._kept[0] != self.stamp:
            m, inverse = self.compute(torch.float64)
            self._kept = (self.stamp, (m.float(), inverse.float()))
        return self._kept[1]

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the condition number of dense matrices within MAX_CONDITION."""
        if self.kind == "dense":
            limit = math.log(MAX_CONDITION) / 2
            self.stretch.clamp_(-limit, limit)


def _turns(angles: Tensor, n: int) -> Tensor:
    blocks, pairs = angles.shape
    i = torch.arange(pairs, device=angles.device)
    j = i + pairs
    out = torch.eye(n, dtype=angles.dtype, device=angles.device).repeat(blocks, 1, 1)
    cos, sin = angles.cos(), angles.sin()
    rows, columns = torch.cat([i, i, j, j]), torch.cat([i, j, i, j])
    return out.index_put((torch.arange(blocks, device=angles.device)[:, None], rows[None], columns[None]),
                         torch.cat([cos, -sin, sin, cos], 1))  # fmt: skip


@dataclass(frozen=True)
class MatrixUse:
    """A matrix along one dimension of a tensor: M on its rows, or M's inverse on its columns.

    ``index`` gives the matrix of each block of that dimension; None: one block each.
    """

    matrix: Matrix
    dim: str
    index: Tensor | None

    def __call__(self, tensor: Tensor, *, exact: bool = False) -> Tensor:
        """``tensor`` ``[out, in]`` or ``[out]``; ``exact`` computes the matrix in float64."""
        pair = self.matrix.compute(torch.float64) if exact else self.matrix.values()
        m = pair[0] if self.dim == "rows" else pair[1]
        if self.index is not None:
            m = m[self.index]
        blocks, n, _ = m.shape
        if self.dim == "rows":
            return (m @ tensor.reshape(blocks, n, -1)).reshape(tensor.shape)
        return (tensor.reshape(-1, blocks, n).transpose(0, 1) @ m).transpose(0, 1).reshape(tensor.shape)
