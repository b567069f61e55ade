"""How much a layer matters, and how much rounding it to some bits is expected to cost. No weight is written to.

Each measure turns a batch of token ids into losses ``[units, choices]``, to be summed over the batches:

- ``jaccard``: importance of a decoder layer = Jaccard distance between the likeliest tokens its input and its output
  stand for (LSAQ, Zeng et al. 2024), times the noise power of the rounding, 4^-bits. The choices are never rounded.
- ``kl``: divergence of the next-token distribution when this projection alone is rounded. A forward pass for each
  projection and choice: the slowest.
- ``hessian``: second-order estimate for each projection, 1/2 sum F (w - round(w))^2 with F the diagonal of the Fisher
  information, which is the Gauss-Newton Hessian of that divergence (OBD, LeCun et al. 1990; HAWQ-V2, Dong et al. 2020,
  for the allocation). Labels are drawn from the model's own distribution, one backward pass for each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..nn.tunable import TunableWeight
from ..numerics import dequantize
from ..plan import Plan
from ..tune.objective import kl_top_k
from .budget import Unit, with_bits

# Tokens that a hidden state stands for.
JACCARD_TOP_K = 20
_KL_TOP_K = 1024
# Positions whose vocabulary projections are held at once.
_BLOCK = 512

# ids [batch, length], index of the first sequence -> losses float64 [units, choices], summed over the sequences
Losses = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Measure:
    """A row of :data:`MEASURES`.

    Args:
        make: (model, plan, units, choices, seed) -> the function of a batch.
        by_layer: units are decoder layers, not projections.
        sequences: how many are enough.
        batch: sequences at a time, None for the run's batch size.
    """

    make: Callable[[nn.Module, Plan, Sequence[Unit], Sequence[int], int], Losses]
    by_layer: bool
    sequences: int
    batch: int | None = None


def _jaccard(model: nn.Module, plan: Plan, units: Sequence[Unit], choices: Sequence[int], seed: int) -> Losses:
    noise = torch.tensor([4.0**-bits for bits in choices], dtype=torch.float64)

    def losses(ids: Tensor, first: int) -> Tensor:
        return (layer_importance(model, plan, ids) * len(ids))[:, None] * noise

    return losses


@torch.no_grad()
def layer_importance(model: nn.Module, plan: Plan, ids: Tensor, *, top_k: int = JACCARD_TOP_K) -> Tensor:
    """1 - |A and B| / |A or B| of each decoder layer, mean over the tokens: float64 ``[layers]`` in [0, 1].

    A and B are the ``top_k`` tokens of ``head(norm(h))`` for the layer's input and output h.

    Args:
        ids: int64 ``[batch, length]``.
    """
    f, states = plan.family, []
    layers = [model.get_submodule(f.layer(i)) for i in range(plan.geometry.layers)]
    handles = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    handles += [
        layer.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    try:
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    norm, head = model.get_submodule(f.final_norm), model.get_submodule(f.head)
    size = min(top_k, plan.geometry.vocabulary)

    def likeliest(state: Tensor) -> Tensor:
        blocks = state.flatten(0, -2).split(_BLOCK)
        return torch.cat([head(norm(block)).topk(size, dim=-1).indices for block in blocks])

    tops = [likeliest(state) for state in states]
    importance = []
    for before, after in zip(tops, tops[1:], strict=False):
        blocks = zip(before.split(_BLOCK), after.split(_BLOCK), strict=True)
        common = torch.cat([(b[:, :, None] == a[:, None, :]).sum((1, 2)) for b, a in blocks]).double()
        importance.append(1 - (common / (2 * size - common)).mean())
    return torch.stack(importance).cpu()


def _rounded(model: nn.Module, plan: Plan, path: str, bits: int) -> Tensor:
    """The weight of a projection, rounded to nearest over its full range."""
    source: Any = model.get_submodule(path)
    return dequantize(*TunableWeight(source.weight.detach(), with_bits(plan.weights[path], bits)).codes())


def _kl(model: nn.Module, plan: Plan, units: Sequence[Unit], choices: Sequence[int], seed: int) -> Losses:
    device = next(model.parameters()).device

    @torch.no_grad()
    def losses(ids: Tensor, first: int) -> Tensor:
        inputs = {"input_ids": ids.to(device), "use_cache": False}
        reference = model(**inputs).logits
        found = torch.zeros(len(units), len(choices), dtype=torch.float64)
        for i, unit in enumerate(units):
            for j, bits in enumerate(choices):
                changed = {f"{path}.weight": _rounded(model, plan, path, bits) for path in unit.paths}
                logits = functional_call(model, changed, kwargs=inputs).logits
                found[i, j] = float(kl_top_k(logits, reference, _KL_TOP_K)) * len(ids)
        return found

    return losses


def _hessian(model: nn.Module, plan: Plan, units: Sequence[Unit], choices: Sequence[int], seed: int) -> Losses:
    device = next(model.parameters()).device
    row = {path: i for i, unit in enumerate(units) for path in unit.paths}

    def losses(ids: Tensor, first: int) -> Tensor:
        found = torch.zeros(len(units), len(choices), dtype=torch.float64)

        def collect(path: str) -> Callable[[Tensor], None]:
            def take(leaf: Tensor) -> None:
                assert leaf.grad is not None
                square = leaf.grad.square()
                leaf.grad = None  # one matrix of gradients at a time
                for j, bits in enumerate(choices):
                    error = (_rounded(model, plan, path, bits) - leaf.detach()).square()
                    found[row[path], j] += float((square * error).sum(dtype=torch.float64)) / 2

            return take

        leaves = {name: parameter.detach() for name, parameter in model.named_parameters()}  # share the numbers
        for path in row:
            leaf = leaves[f"{path}.weight"].requires_grad_()
            leaf.register_post_accumulate_grad_hook(collect(path))
        for offset, sequence in enumerate(ids.split(1)):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + first + offset)
            with torch.enable_grad():
                inputs = {"input_ids": sequence.to(device), "use_cache": False}
                logits = functional_call(model, leaves, kwargs=inputs).logits[0]
                chosen = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
                # Gradients of single positions cannot be told apart in one pass; with labels drawn at random they are
                # uncorrelated, so the square of their sum has the sum of their squares as its mean.
                F.cross_entropy(logits.float(), chosen.flatten().to(device), reduction="sum").backward()
        return found / ids.shape[1]

    return losses


MEASURES: dict[str, Measure] = {
    "jaccard": Measure(_jaccard, by_layer=True, sequences=64),
    "kl": Measure(_kl, by_layer=False, sequences=16),
    "hessian": Measure(_hessian, by_layer=False, sequences=32, batch=1),
}
