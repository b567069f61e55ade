"""Apply the data of transform edges to a plain transformers model: independent of the student's tunable weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optimum_mobilequant.transform import Edge


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
