"""Where the network can be multiplied by whole matrices without changing its function.

A :class:`MatrixEdge` is one invertible matrix M, or one for each KV head, and the tensors it acts on: what writes a
vector has its rows multiplied by M, what reads it has its columns multiplied by M's inverse. Everything merges into
weights; nothing is left to compute at run time.

Sites::

    r1            residual stream (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2025): orthogonal; embedding and
                  writers' rows, readers' columns. Norm gains go into their readers first, so that the norm commutes.
    r2            v rows -> o columns (SpinQuant): orthogonal, one for each KV head
    v_o_dense     v rows -> o columns (FPTQuant, van Breugel et al. 2025): any invertible matrix, one for each KV head
    q_k_rotation  q rows <-> k rows (FPTQuant): a turn within each rotary pair, which commutes with the rotary
                  embedding; with the scales of ``q_k`` this is every map that does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..families import Family, Geometry
from .hadamard import rotation

MATRIX_SITES = ("v_o_dense", "q_k_rotation")
ROTATIONS = {"r1": ("r1",), "r2": ("r2",), "r1r2": ("r1", "r2")}
# A gain below this share of the largest one cannot be divided out of a LayerNorm's bias.
_SMALLEST_GAIN = 1e-4


@dataclass(frozen=True)
class MatrixEffect:
    """What an edge does to one module.

    Args:
        module: dotted path of a linear, the embedding, or a norm (its bias).
        dim: ``"rows"`` (weight rows and bias: M) or ``"columns"`` (inverse of M).
        index: int64, the matrix for each block of rows or columns; None for one block each.
    """

    module: str
    dim: str
    index: Tensor | None = None


@dataclass(frozen=True)
class Fold:
    """A norm whose gain moves into the columns of its readers, leaving a gain of 1."""

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class MatrixEdge:
    """One matrix for each of ``blocks``.

    Args:
        name: ``<layer path>.<site>``, or ``r1``.
        kind: ``"orthogonal"``, ``"dense"`` or ``"plane"`` (turns of rotary pairs), see ``nn.matrix``.
        start: float64 ``[blocks, size, size]``.
        rotary_dims: leading dims of a block that form pairs (``"plane"`` only).
        folds: norms that must lose their gain first.
        keeps_mean: the vector of ones must stay in place (LayerNorm).
    """

    name: str
    site: str
    kind: str
    start: Tensor
    effects: tuple[MatrixEffect, ...]
    rotary_dims: int = 0
    folds: tuple[Fold, ...] = ()
    keeps_mean: bool = False


def matrix_edges_of(
    family: Family, geometry: Geometry, sites: Sequence[str], rotate: str | None, *, seed: int = 0
) -> list[MatrixEdge]:
    """The edges of ``sites`` (of MATRIX_SITES; others are skipped) and of ``rotate`` (a key of ROTATIONS, or None).

    Args:
        seed: of the random signs and matrices that rotations start from.
    """
    chosen = {*sites, *(ROTATIONS[rotate] if rotate else ())}
    edges = [_r1(family, geometry, seed)] if "r1" in chosen else []
    for i in range(geometry.layers):
        for site in (s for s in _BUILDERS if s in chosen):
            edges.append(_BUILDERS[site](f"{family.layer(i)}.{site}", family, geometry, i, seed + 1 + i))
    return edges


def _r1(f: Family, g: Geometry, seed: int) -> MatrixEdge:
    effects, folds = [MatrixEffect(f.embedding, "columns")], []
    for i in range(g.layers):
        attention = tuple(f.layer(i, part) for part in (f.query, f.key, f.value))
        mlp = tuple(f.layer(i, part) for part in (f.gate, f.up))
        folds += [Fold(f.layer(i, f.input_norm), attention), Fold(f.layer(i, f.mlp_norm), mlp)]
        effects += [MatrixEffect(f.layer(i, part), "rows") for part in (f.out, f.down)]
    folds.append(Fold(f.final_norm, (f.head,)))
    for fold in folds:
        effects += [MatrixEffect(reader, "columns") for reader in fold.readers]
        effects.append(MatrixEffect(fold.norm, "rows"))  # its bias, where it has one
    keeps_mean = f.norm_kind == "layer"
    start = rotation(g.hidden, seed, keeps_mean=keeps_mean)[None]
    return MatrixEdge("r1", "r1", "orthogonal", start, tuple(effects), folds=tuple(folds), keeps_mean=keeps_mean)


def _value_out(f: Family, g: Geometry, i: int) -> tuple[MatrixEffect, ...]:
    kv_head = torch.arange(g.heads) // g.groups
    return MatrixEffect(f.layer(i, f.value), "rows"), MatrixEffect(f.layer(i, f.out), "columns", kv_head)


def _r2(name: str, f: Family, g: Geometry, i: int, seed: int) -> MatrixEdge:
    start = torch.stack([rotation(g.head_dim, seed * 1009 + head) for head in range(g.kv_heads)])
    return MatrixEdge(name, "r2", "orthogonal", start, _value_out(f, g, i))


def _v_o_dense(name: str, f: Family, g: Geometry, i: int, seed: int) -> MatrixEdge:
    return MatrixEdge(name, "v_o_dense", "dense", _identities(g), _value_out(f, g, i))


def _q_k_rotation(name: str, f: Family, g: Geometry, i: int, seed: int) -> MatrixEdge:
    kv_head = torch.arange(g.heads) // g.groups
    effects = (MatrixEffect(f.layer(i, f.query), "rows", kv_head), MatrixEffect(f.layer(i, f.key), "rows"))
    return MatrixEdge(name, "q_k_rotation", "plane", _identities(g), effects, rotary_dims=g.rotary_dims)


def _identities(g: Geometry) -> Tensor:
    return torch.eye(g.head_dim, dtype=torch.float64).repeat(g.kv_heads, 1, 1)


_BUILDERS = {"r2": _r2, "v_o_dense": _v_o_dense, "q_k_rotation": _q_k_rotation}


def refuse_unmergeable(
    model: nn.Module, family: Family, geometry: Geometry, sites: Sequence[str], rotate: str | None
) -> None:
    """Refuse matrices that do not merge into the weights of this architecture.

    Args:
        geometry: ``tied`` says whether the head will still read the embedding's table (False once untied).

    Raises:
        ValueError: names the reason and the way out.
    """
    if "q_k_rotation" in sites:
        if family.query_norm or family.key_norm:
            raise ValueError(
                f'transform "q_k_rotation" does not merge into {family.name}: its q/k norms multiply by a gain '
                "between the projection and the rotation, and a turn does not pass a gain; leave it out (the scales "
                'of "q_k" do merge)'
            )
        if not geometry.rotary_dims:
            raise ValueError('transform "q_k_rotation" turns rotary pairs, and this model has none; leave it out')
    if rotate is None or "r1" not in ROTATIONS[rotate]:
        return
    if geometry.tied:
        size = geometry.vocabulary * geometry.hidden / 2**20
        raise ValueError(
            f'rotate="{rotate}" rotates the embedding and the head differently (the final norm\'s gain goes into the '
            f"head), but this model ties them; set untie=True, which adds a head of {size:.1f} MiB at 8 bits, or use "
            'rotate="r2"'
        )
    if family.norm_kind != "layer":
        return
    for path in _norms(family, geometry):
        gain, bias = (_tensor(model, f"{path}.{name}") for name in ("weight", "bias"))
        if gain is None or bias is None or not bool(bias.any()):
            continue
        if float(gain.abs().min()) < _SMALLEST_GAIN * float(gain.abs().max()):
            raise ValueError(
                f'rotate="{rotate}" moves the gain of {path} behind its bias, which divides the bias by the gain, and '
                'some gains are (nearly) 0; use rotate="r2"'
            )


def _norms(f: Family, g: Geometry) -> list[str]:
    return [f.layer(i, norm) for i in range(g.layers) for norm in (f.input_norm, f.mlp_norm)] + [f.final_norm]


def _tensor(model: nn.Module, path: str) -> Tensor | None:
    owner, _, name = path.rpartition(".")
    found: Tensor | None = getattr(model.get_submodule(owner), name, None)
    return None if found is None else found.detach()
