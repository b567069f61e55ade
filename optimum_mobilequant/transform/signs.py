"""Signs of channels: all longer tails to one side, so that a common static range has finer steps.

A scale of -1 between a producer and its consumers is as exact as any other (of a gated MLP in up and down, of values
and o, of a norm's gain and its readers), and changes no bit of what the float model computes. Ranges are asymmetric
but common to all channels: two that reach from -0.4 to 1 and from -1 to 0.4 need [-1, 1], and [-0.4, 1] with the
second one's sign turned. What is left of the shorter tails decides how far the scales may go, see
:func:`fitted_absmax`. The idea is this project's; a shift of each channel to the same end, which needs biases, is that
of Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

# (module path, "rows" or "columns", +1 or -1 for each of them)
Turn = tuple[str, str, Tensor]


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
            turns.append((effect.module, effect.dim, sign if effect.index is None else sign[effect.index]))
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


@torch.no_grad()
def turn(model: nn.Module, turns: Sequence[Turn], student: nn.Module | None = None) -> None:
    """Turn signs of a float model's parameters; the same again turns them back, bit for bit.

    Args:
        student: shares the parameters of ``model`` and is given the new ones. None if there is none.
    """
    for path, dim, sign in turns:
        module: Any = model.get_submodule(path)
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if parameter is None or (name == "bias" and dim == "columns"):
                continue
            sign = sign.to(parameter)
            # Not in place: somebody may hold the old tensor.
            parameter.data = parameter.data * (sign[:, None] if dim == "rows" and parameter.ndim == 2 else sign)
            provider: Any = None if student is None else getattr(student.get_submodule(path), name)
            if provider is not None:
                object.__setattr__(provider, "source", parameter.detach())
            if isinstance(provider, TunableWeight):
                provider.forget()
        if student is not None and dim == "rows":
            _turn_prefix(student, path, sign)


def _turn_prefix(student: nn.Module, path: str, sign: Tensor) -> None:
    """The values of a prefix that the projection ``path`` makes."""
    attention: Any = student.get_submodule(path.rpartition(".")[0])
    prefix = getattr(attention, "prefix", None)
    if isinstance(prefix, TunablePrefix) and path.endswith(f".{prefix.paths[1]}"):
        prefix.turn_values(sign)


def _shared(edge: Edge, index: Tensor | None, channels: Tensor, reduce: str) -> Tensor:
    """Ends over the channels that share an element of the edge."""
    if index is None:
        return channels
    return torch.zeros(edge.size).scatter_reduce_(0, index, channels, reduce)
