"""Start values of the transforms: SmoothQuant's balance between activation and weight magnitude."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .edges import Edge


@torch.no_grad()
def smooth_scales(
    edges: Sequence[Edge],
    model: nn.Module,
    channel_absmax: Mapping[str, Tensor],
    alpha: float,
    *,
    weight_of: Callable[[str], Tensor] | None = None,
    silent: float = 0.0,
) -> dict[str, Tensor]:
    """Start value of each edge: what its consumers can carry is taken off what its activation must represent.

    Producer/consumer edges: ``s = max|x|^alpha / max|w|^(1 - alpha)`` (SmoothQuant, Xiao et al. 2023, equation 4),
    with ``max|w|`` over all consumers' rows. Query/key edges, where two activations trade:
    ``s = max|q|^(1 - alpha) / max|k|^alpha``. Maxima run over the channels that share an element of the edge.
    Channels that never fire keep s = 1.

    Args:
        edges: from :func:`edges_of`.
        model: the float model that ``edges`` name.
        channel_absmax: quantizer name -> float32 ``[channels]``.
        alpha: migration strength in [0, 1].
        silent: channels whose magnitude is below so many times the median channel's keep s = 1, too. A unit that fires
            at the tokens of a prefix alone is one: bringing it to the others' level would blow up what it multiplies.
        weight_of: module path -> weight, where matrices have changed the model's own; None reads the model.

    Returns:
        edge name -> natural logarithms, float32 ``[edge.size]``.
    """
    logs: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}  # log-scales that the edges done so far put on a module's rows

    def weight_absmax(module: str) -> Tensor:
        weight = (_weight(model, module) if weight_of is None else weight_of(module)).float().abs()
        return (weight * rows[module].exp()[:, None] if module in rows else weight).amax(0)

    # A reader's columns are judged as its rows will be: else one large row that another edge is about to level decides
    # over all of them.
    for edge in sorted(edges, key=lambda e: e.site.startswith("norm")):
        device = _weight(model, edge.effects[0].module).device
        if edge.trade is not None and edge.trade_index is not None:
            query, key = (
                _shared_max(edge, index, channel_absmax[name], device)
                for name, index in zip(edge.trade, edge.trade_index, strict=True)
            )
            of_x, of_w, alpha_x = query, key, 1 - alpha
        else:
            consumers = [e for e in edge.effects if e.dim == "columns"]
            of_x = _shared_max(edge, consumers[0].index, channel_absmax[edge.activation], device)
            of_w = torch.stack([_shared_max(edge, e.index, weight_absmax(e.module), device) for e in consumers]).amax(
                0
            )
            alpha_x = alpha
        fires = (of_x > silent * of_x.median()) & (of_x > 0)
        log = alpha_x * of_x.clamp(min=1e-30).log() - (1 - alpha_x) * of_w.clamp(min=1e-30).log()
        logs[edge.name] = torch.where(fires & (of_w > 0), log, 0.0)
        for effect in edge.effects:
            if effect.dim == "rows" and _weight(model, effect.module).ndim == 2:
                change = effect.sign * (
                    logs[edge.name] if effect.index is None else logs[edge.name][effect.index.to(device)]
                )
                rows[effect.module] = rows[effect.module] + change if effect.module in rows else change
    return {edge.name: logs[edge.name] for edge in edges}


def _shared_max(edge: Edge, index: Tensor | None, channels: Tensor, device: torch.device) -> Tensor:
    """Maximum of ``channels`` over those that share each element of the edge."""
    if index is None:
        return channels.to(device)
    return torch.zeros(edge.size, device=device).scatter_reduce_(0, index.to(device), channels.to(device), "amax")


def _weight(model: nn.Module, path: str) -> Tensor:
    return model.get_parameter(f"{path}.weight")
