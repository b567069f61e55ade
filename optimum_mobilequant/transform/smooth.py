"""Start values of the transforms: SmoothQuant's balance between activation and weight magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .edges import Edge


@torch.no_grad()
def smooth_scales(
    edges: Sequence[Edge], model: nn.Module, channel_absmax: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Log of ``s = max|x|^alpha / max|w|^(1 - alpha)`` for each edge (SmoothQuant, Xiao et al. 2023, equation 4).

    ``max|w|`` runs over all consumers' rows; both maxima run over the channels that share an element of the edge.
    Channels that never fire keep s = 1. Edges without an activation (q_k) start at 1.

    Args:
        edges: from :func:`edges_of`.
        model: the float model that ``edges`` name.
        channel_absmax: quantizer name -> float32 ``[channels]``.
        alpha: migration strength in [0, 1].

    Returns:
        edge name -> float32 ``[edge.size]``.
    """
    logs: dict[str, Tensor] = {}
    for edge in edges:
        device = model.get_submodule(edge.effects[0].module).weight.device
        logs[edge.name] = torch.zeros(edge.size, device=device)
        if edge.activation is None:
            continue
        of_x = logs[edge.name].clone()
        of_w = logs[edge.name].clone()
        for effect in (e for e in edge.effects if e.dim == "columns"):
            index = torch.arange(edge.size) if effect.index is None else effect.index
            columns = model.get_submodule(effect.module).weight.float().abs().amax(0)
            of_w.scatter_reduce_(0, index.to(device), columns, "amax")
            of_x.scatter_reduce_(0, index.to(device), channel_absmax[edge.activation].to(device), "amax")
        alive = (of_x > 0) & (of_w > 0)
        log = alpha * of_x.clamp(min=1e-30).log() - (1 - alpha) * of_w.clamp(min=1e-30).log()
        logs[edge.name] = torch.where(alive, log, 0.0)
    return logs
