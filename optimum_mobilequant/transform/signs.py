"""Signs of channels: all longer tails to one side, so that a common static range has finer steps.

A scale of -1 between a producer and its consumers is as exact as any other (of a gated MLP in up and down, of values
and o, of a norm's gain and its readers), and changes no bit of what the float model computes. Of a rotary pair of
queries and keys a quarter turn is as good: (x, y) to (-y, x) commutes with the rotary embedding, and can bring both
dims of a pair whose mean is far from 0 to the positive side. Only the order of the terms of q·k changes.

Ranges are asymmetric but common to all channels: two that reach from -0.4 to 1 and from -1 to 0.4 need [-1, 1], and
[-0.4, 1] with the second one's sign turned. What is left of the shorter tails decides how far the scales may go, see
:func:`fitted_absmax`. The idea is this project's; a shift of each channel to the same end, which needs biases, is that
of Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Statistics
from ..nn.prefix import TunablePrefix
from ..nn.tunable import TunableWeight
from ..plan import Plan
from .edges import Edge, edges_of

SIGN_SITES = ("signs",)
_SITES = ("norm_qkv", "norm_mlp", "up_down", "v_o")
# Shares of the positive end that the negative end of a range may have.
_SHARES = torch.linspace(0.2, 1.0, 81)


@dataclass(frozen=True)
class Turn:
    """Rows or columns of a module that change their signs, and rows that change places.

    Args:
        module: dotted path. dim: ``"rows"`` (and bias) or ``"columns"``.
        sign: float32, +1 or -1 for each of them, as they are afterwards.
        order: int64, which of the old rows each new one is; None keeps the order.
    """

    module: str
    dim: str
    sign: Tensor
    order: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` with the turned axis first."""
        x = x if self.order is None else x[self.order.to(x.device)]
        return x * self._signs(x)

    def back(self, x: Tensor) -> Tensor:
        """Inverse of a call, bit for bit."""
        x = x * self._signs(x)
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order.to(x.device), x)

    def _signs(self, x: Tensor) -> Tensor:
        return self.sign.to(x).view(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def signs_of(statistics: Statistics, plan: Plan, rotate: str | None) -> tuple[list[Turn], Statistics]:
    """Which rows and columns to turn, and the magnitudes that scales should level behind that.

    Args:
        statistics: with ends of every channel.
        rotate: R1 moves the norms' gains into their readers, so there is none to turn.
    """
    turns: list[Turn] = []
    absmax = dict(statistics.channel_absmax)
    gains = plan.family.gain_offset == 0.0 and rotate not in ("r1", "r1r2")
    sites = [site for site in _SITES if gains or not site.startswith("norm")]
    for edge in edges_of(plan.family, plan.geometry, sites):
        index = next(effect.index for effect in edge.effects if effect.dim == "columns")
        low, high = statistics.channel_ends[edge.activation]
        low, high = _shared(edge, index, low.clamp(max=0.0), "amin"), _shared(edge, index, high.clamp(min=0.0), "amax")
        sign = torch.where(-low > high, -1.0, 1.0)
        for effect in edge.effects:
            turns.append(Turn(effect.module, effect.dim, sign if effect.index is None else sign[effect.index]))
        fitted = fitted_absmax(torch.maximum(-low, high), torch.minimum(-low, high))
        absmax[edge.activation] = fitted if index is None else fitted[index]
    return turns, replace(statistics, channel_absmax=absmax)


def fitted_absmax(longer: Tensor, shorter: Tensor) -> Tensor:
    """What scales should level: the longer tail of a channel, or the shorter one where it would reach further.

    A range from -s to 1 has steps of (1 + s) / 255. With channels scaled until none leaves it, the noise of channel c
    in its own units is ((1 + s) max(longer, shorter / s))^2; s has the least mean of it relative to longer^2.

    Args:
        longer, shorter: float32 ``[channels]``, at least 0.

    Returns:
        float32 ``[channels]``.
    """
    live = longer > 0
    if not bool(live.any()):
        return longer
    ratio = (shorter[live] / longer[live])[None]
    shares = _SHARES.to(longer.device)[:, None]
    noise = ((1 + shares) * (ratio / shares).clamp(min=1.0)).square().mean(1)
    return torch.maximum(longer, shorter / shares[noise.argmin(), 0])


# Quarter turns of a pair: which dim each of the two becomes, and its sign.
_QUARTERS = (((0, 1), (1, 1)), ((1, -1), (0, 1)), ((0, -1), (1, -1)), ((1, 1), (0, -1)))


@torch.no_grad()
def quarter_turns_of(statistics: Statistics, plan: Plan) -> tuple[list[Turn], Statistics]:
    """The quarter turn of each rotary pair that leaves the queries of a KV head the shortest way below zero.

    The keys turn with them. Families with norms between projection and rotation have none: their gains are common to
    all heads.

    Returns:
        Turns of the query and key projections, and the statistics of turned keys and queries.
    """
    f, g = plan.family, plan.geometry
    half, turns = g.rotary_dims // 2, []
    ends, absmax = dict(statistics.channel_ends), dict(statistics.channel_absmax)
    for i in range(g.layers if half and not (f.query_norm or f.key_norm) else 0):
        names = [f"{f.layer(i, f.attention)}.{name}_rotated" for name in ("query", "key")]
        low, high = ends[names[0]].view(2, g.kv_heads, g.groups, g.head_dim)
        pairs = torch.stack([low.amin(1), -high.amax(1)])[..., : 2 * half].view(2, g.kv_heads, 2, half)
        # pairs[0]: the negative end of each dim as it is, pairs[1]: with its sign turned
        reach = [torch.stack([pairs[int(sign < 0), :, old] for old, sign in quarter]).amin(0) for quarter in _QUARTERS]
        chosen = torch.stack(reach).argmax(0)  # [kv_heads, half]: the least negative one
        order = torch.arange(g.head_dim).repeat(g.kv_heads, 1)
        sign = torch.ones(g.kv_heads, g.head_dim)
        for number, quarter in enumerate(_QUARTERS):
            heads, pair = (chosen == number).nonzero(as_tuple=True)
            for new, (old, factor) in enumerate(quarter):
                order[heads, pair + new * half] = pair + old * half
                sign[heads, pair + new * half] = float(factor)
        for name, part, count in zip(names, (f.query, f.key), (g.heads, g.kv_heads), strict=True):
            own = torch.arange(count) // (count // g.kv_heads)
            rows = (torch.arange(count)[:, None] * g.head_dim + order[own]).reshape(-1)
            turn = Turn(f.layer(i, part), "rows", sign[own].reshape(-1), rows)
            turns.append(turn)
            moved = turn(ends[name].t()).t()
            ends[name] = torch.stack([moved.amin(0), moved.amax(0)])
            absmax[name] = absmax[name][rows]
    return turns, replace(statistics, channel_ends=ends, channel_absmax=absmax)


@torch.no_grad()
def turn(model: nn.Module, turns: Sequence[Turn], student: nn.Module | None = None, *, back: bool = False) -> None:
    """Turn parameters of a float model, or turn them back, which restores every bit.

    Args:
        student: shares the parameters of ``model`` and is given the new ones. None if there is none.
    """
    for entry in reversed(turns) if back else turns:
        module: Any = model.get_submodule(entry.module)
        change = entry.back if back else entry
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if parameter is None or (name == "bias" and entry.dim == "columns"):
                continue
            # Not in place: somebody may hold the old tensor.
            data = parameter.data
            parameter.data = change(data) if entry.dim == "rows" else change(data.t()).t().contiguous()
            provider: Any = None if student is None else getattr(student.get_submodule(entry.module), name)
            if provider is not None:
                object.__setattr__(provider, "source", parameter.detach())
            if isinstance(provider, TunableWeight):
                provider.forget()
        if student is not None and entry.dim == "rows":
            _turn_prefix(student, entry)


def _turn_prefix(student: nn.Module, entry: Turn) -> None:
    """The keys or values of a prefix that the projection makes."""
    attention: Any = student.get_submodule(entry.module.rpartition(".")[0])
    prefix = getattr(attention, "prefix", None)
    if isinstance(prefix, TunablePrefix):
        prefix.turn(entry.module.rpartition(".")[2], entry)


def _shared(edge: Edge, index: Tensor | None, channels: Tensor, reduce: str) -> Tensor:
    """Ends over the channels that share an element of the edge."""
    if index is None:
        return channels
    return torch.zeros(edge.size).scatter_reduce_(0, index, channels, reduce)
