"""Where the network can be rescaled without changing its function.

An :class:`Edge` is one vector of log-scales and the tensors it acts on: producers are divided by the scale, consumers
multiplied. Indices express what must be shared for the rescaling to be exact: query heads of one KV head, and the two
dims of a rotary pair (a rotation mixes them, so different scales would not commute with it).

Sites (MobileQuant section 3.1; SmoothQuant, Xiao et al. 2023, for the norm sites; OmniQuant, Shao et al. 2024, for v/o
and q/k; cross-layer equalization, Nagel et al. 2019, for up/down)::

    norm_qkv   input norm gain -> q, k, v columns
    norm_mlp   second norm gain -> gate, up columns
    up_down    up rows -> down columns       exact: act(gate) * up is linear in up
    v_o        v rows -> o columns           shared by the query heads of a KV head
    q_k        q rows <-> k rows             shared as v_o, tied per rotary pair; in the gains where q/k norms exist
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family, Geometry

SITES = ("norm_qkv", "norm_mlp", "up_down", "v_o", "q_k")


@dataclass(frozen=True)
class Effect:
    """What an edge does to one module.

    Args:
        module: dotted path of a linear or a norm.
        dim: ``"rows"`` (weight rows and bias; a norm's gain and bias) or ``"columns"``.
        sign: -1 divides by the scale, +1 multiplies.
        index: int64, element of the edge's vector for each row or column; None for the identity.
    """

    module: str
    dim: str
    sign: int
    index: Tensor | None = None


@dataclass(frozen=True)
class Edge:
    """One vector of log-scales.

    Args:
        name: ``<layer path>.<site>``. site: of :data:`SITES`. size: number of scales.
        effects: all tensors that move together.
        activation: quantizer whose per-channel magnitude the scale divides; "" where two activations trade.
        trade: (query, key) quantizers whose magnitudes the scale trades, or None. trade_index: element of the vector
            for each of their channels.
    """

    name: str
    site: str
    size: int
    effects: tuple[Effect, ...]
    activation: str = ""
    trade: tuple[str, str] | None = None
    trade_index: tuple[Tensor, Tensor] | None = None


def edges_of(family: Family, geometry: Geometry, sites: Sequence[str]) -> list[Edge]:
    """All edges of the chosen sites, layer by layer.

    Args:
        family, geometry: of the model, see ``family_of`` and ``geometry_of``.
        sites: of :data:`SITES`, in any order.

    Raises:
        ValueError: unknown site.
    """
    if unknown := set(sites) - set(SITES):
        raise ValueError(f"unknown transform sites {sorted(unknown)}; known: {', '.join(SITES)}")
    edges: list[Edge] = []
    for i in range(geometry.layers):
        layer = family.layer(i)
        for site in (s for s in SITES if s in sites):
            edges.append(_BUILDERS[site](f"{layer}.{site}", family, geometry, i))
    return edges


def _norm_qkv(name: str, f: Family, g: Geometry, i: int) -> Edge:
    norm, readers = f.layer(i, f.input_norm), [f.layer(i, part) for part in (f.query, f.key, f.value)]
    effects = (Effect(norm, "rows", -1), *(Effect(r, "columns", 1) for r in readers))
    return Edge(name, "norm_qkv", g.hidden, effects, f"{norm}.output")


def _norm_mlp(name: str, f: Family, g: Geometry, i: int) -> Edge:
    norm, readers = f.layer(i, f.mlp_norm), [f.layer(i, part) for part in (f.gate, f.up)]
    effects = (Effect(norm, "rows", -1), *(Effect(r, "columns", 1) for r in readers))
    return Edge(name, "norm_mlp", g.hidden, effects, f"{norm}.output")


def _up_down(name: str, f: Family, g: Geometry, i: int) -> Edge:
    down = f.layer(i, f.down)
    effects = (Effect(f.layer(i, f.up), "rows", -1), Effect(down, "columns", 1))
    return Edge(name, "up_down", g.mlp, effects, f"{down}.input")


def _v_o(name: str, f: Family, g: Geometry, i: int) -> Edge:
    effects = (
        Effect(f.layer(i, f.value), "rows", -1),
        Effect(f.layer(i, f.out), "columns", 1, _by_query_head(g, torch.arange(g.head_dim), g.head_dim)),
    )
    return Edge(name, "v_o", g.kv_heads * g.head_dim, effects, f"{f.layer(i, f.attention)}.context")


def _q_k(name: str, f: Family, g: Geometry, i: int) -> Edge:
    dims = rotary_pairs(g.head_dim, g.rotary_dims)
    per_head, attention = int(dims.max()) + 1, f.layer(i, f.attention)
    trade = (f"{attention}.query_rotated", f"{attention}.key_rotated")
    if f.query_norm and f.key_norm:  # one gain vector serves all heads
        effects = (
            Effect(f"{attention}.{f.query_norm}", "rows", -1, dims),
            Effect(f"{attention}.{f.key_norm}", "rows", 1, dims),
        )
        return Edge(name, "q_k", per_head, effects, "", trade, (dims.repeat(g.heads), dims.repeat(g.kv_heads)))
    query_index = _by_query_head(g, dims, per_head)
    key_index = (torch.arange(g.kv_heads)[:, None] * per_head + dims).reshape(-1)
    effects = (
        Effect(f.layer(i, f.query), "rows", -1, query_index),
        Effect(f.layer(i, f.key), "rows", 1, key_index),
    )
    return Edge(name, "q_k", g.kv_heads * per_head, effects, "", trade, (query_index, key_index))


_BUILDERS = {"norm_qkv": _norm_qkv, "norm_mlp": _norm_mlp, "up_down": _up_down, "v_o": _v_o, "q_k": _q_k}


def rotary_pairs(head_dim: int, rotary_dims: int) -> Tensor:
    """Element of a tied q/k scale for each dim of a head, int64 ``[head_dim]``.

    Dims i and i + rotary_dims / 2 rotate together and share one; the dims past ``rotary_dims`` do not rotate and have
    their own.
    """
    half = rotary_dims // 2
    rotating = torch.arange(rotary_dims) % half if half else torch.empty(0, dtype=torch.int64)
    return torch.cat([rotating, half + torch.arange(head_dim - rotary_dims)])


def _by_query_head(g: Geometry, dims: Tensor, per_head: int) -> Tensor:
    kv_head = torch.arange(g.heads) // g.groups
    return (kv_head[:, None] * per_head + dims).reshape(-1)
