"""Apply the data of transform edges to a plain transformers model: independent of the student's tunable weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optimum_mobilequant.nn.matrix import Matrix
from optimum_mobilequant.transform import Edge, MatrixEdge


@torch.no_grad()
def fold(model: nn.Module, edges: Sequence[Edge], scales: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` (any float dtype) with every effect of every edge multiplied into its tensors."""
    folded = copy.deepcopy(model)
    offset = 1.0 if model.config.model_type == "gemma" else 0.0
    for edge in edges:
        theta = scales[edge.name]
        assert theta.shape == (edge.size,)
        for effect in edge.effects:
            module = folded.get_submodule(effect.module)
            log = theta if effect.index is None else theta[effect.index]
            factor = torch.exp(effect.sign * log.double())
            weight = module.weight.double()
            if effect.dim == "columns":
                module.weight.copy_(weight * factor[None, :])
            elif weight.ndim == 2:
                module.weight.copy_(weight * factor[:, None])
            else:
                module.weight.copy_((weight + offset) * factor - offset)
            if effect.dim == "rows" and getattr(module, "bias", None) is not None:
                module.bias.copy_(module.bias.double() * factor)
    return folded


def random_scales(edges: Sequence[Edge], sigma: float = 0.3, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {e.name: torch.randn(e.size, generator=generator) * sigma for e in edges}


class Float64(TorchFunctionMode):
    """Makes the float32 islands of transformers models (norm statistics, softmax, rotary tables) float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor, prompt: int = 5) -> Tensor:
    """Logits of all positions: the prompt at once, then token by token through the KV cache."""
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for i in range(prompt, ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest reference value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def divergence(student: Tensor, teacher: Tensor) -> float:
    """Mean KL(teacher || student) over positions, nats."""
    p, q = (F.log_softmax(x.double(), -1).flatten(0, -2) for x in (teacher, student))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


@torch.no_grad()
def multiply(model: nn.Module, edges: Sequence[MatrixEdge], matrices: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with the matrices ``[blocks, n, n]`` of every edge multiplied into its tensors, untied."""
    changed = copy.deepcopy(model)
    offset = 1.0 if model.config.model_type == "gemma" else 0.0
    if model.config.tie_word_embeddings:
        changed.lm_head.weight = nn.Parameter(changed.lm_head.weight.clone())
    for edge in edges:
        for f in edge.folds:
            norm = changed.get_submodule(f.norm)
            gain = norm.weight + offset
            for reader in f.readers:
                changed.get_submodule(reader).weight.mul_(gain)
            if getattr(norm, "bias", None) is not None:
                norm.bias.div_(gain)
            norm.weight.fill_(1.0 - offset)
        for effect in edge.effects:
            module, blocks = changed.get_submodule(effect.module), matrices[edge.name]
            m = torch.block_diag(*(blocks if effect.index is None else blocks[effect.index])).to(model.dtype)
            if effect.dim == "columns":
                module.weight.copy_(module.weight @ torch.linalg.inv(m))
                continue
            if module.weight.ndim == 2:
                module.weight.copy_(m @ module.weight)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(m @ module.bias)
    return changed


def random_matrices(edges: Sequence[MatrixEdge], sigma: float = 0.3, seed: int = 5) -> dict[str, Matrix]:
    """Matrices of every edge, away from their start values."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for edge in edges:
        matrix = Matrix(edge.kind, edge.start, rotary_dims=edge.rotary_dims, keeps_mean=edge.keeps_mean)
        with torch.no_grad():
            for parameter in matrix.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * sigma)
        out[edge.name] = matrix
    return out


@torch.no_grad()
def exact(matrices: Mapping[str, Matrix]) -> dict[str, Tensor]:
    return {name: matrix.compute(torch.float64)[0] for name, matrix in matrices.items()}
