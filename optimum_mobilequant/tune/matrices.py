"""Hang the matrices of matrix edges on a student's weights and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..nn.matrix import Matrix, MatrixUse
from ..nn.modules import QuantNorm
from ..transform import MatrixEdge


@torch.no_grad()
def attach_matrices(student: nn.Module, edges: Sequence[MatrixEdge]) -> dict[str, Matrix]:
    """Make the matrices of ``edges`` act in ``student``, from their start values; nothing else of it may be tuned yet.

    Returns:
        edge name -> matrix, for :class:`.parameters.Learnables`.
    """
    device = next(student.buffers()).device
    matrices: dict[str, Matrix] = {}
    for edge in edges:
        for fold in edge.folds:
            _fold_gain(student, fold.norm, fold.readers)
        matrix = Matrix(edge.kind, edge.start, rotary_dims=edge.rotary_dims, keeps_mean=edge.keeps_mean, device=device)
        matrices[edge.name] = matrix
        for effect in edge.effects:
            index = None if effect.index is None else effect.index.to(device)
            module: Any = student.get_submodule(effect.module)
            use = MatrixUse(matrix, effect.dim, index)
            if not isinstance(module, QuantNorm):  # a gain of 1 stays one: only the norm's bias turns
                module.weight.matrices.append(use)
            if effect.dim == "rows" and module.bias is not None:
                module.bias.matrices.append(use)
    return matrices


def _fold_gain(student: nn.Module, norm: str, readers: Sequence[str]) -> None:
    module: Any = student.get_submodule(norm)
    gain = module.weight.original(torch.float32)
    module.weight.is_one = True
    if module.bias is not None:
        module.bias.divisor = gain
    for reader in readers:
        linear: Any = student.get_submodule(reader)
        linear.weight.gain = gain
