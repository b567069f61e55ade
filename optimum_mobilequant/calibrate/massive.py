"""Find the tokens of a text that a float model turns into massive activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..log import progress_bar
from ..nn.prefix import prepend
from ..plan import Plan

# A token is an outlier if its largest value is more than so many times that of the median token (PrefixQuant, Chen et
# al. 2024, section 4.1).
FACTOR = 64.0


@dataclass(frozen=True)
class Outliers:
    """Massive activations in a set of texts.

    Attributes:
        per_text: mean number of outlier tokens in a text.
        first: share of the texts whose first token is one.
        tokens: id -> how often it is one, the first token of a text included.
        ratio: largest value of any token over the median token's, at the worst site.
        nll: mean next-token loss on the texts, in nats.
    """

    per_text: float
    first: float
    tokens: Counter[int]
    ratio: float
    nll: float


@torch.no_grad()
def find_outliers(
    model: nn.Module, plan: Plan, ids: Tensor, *, prefix: Sequence[int] = (), batch_size: int = 8
) -> Outliers:
    """Look at what each down projection reads and what each decoder layer returns, token by token.

    Args:
        model: the float model.
        ids: int64 ``[texts, length]``.
        prefix: tokens that the model reads before each text; they are not counted themselves.

    Returns:
        the tokens that are larger than :data:`FACTOR` median tokens at any of these sites.
    """
    f, skip = plan.family, len(prefix)
    sizes: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor) -> None:
        sizes.setdefault(name, []).append(x[:, skip:].abs().amax(-1).float().cpu())

    def reads(name: str) -> Any:
        return lambda _, args: keep(name, args[0])

    def returns(name: str) -> Any:
        return lambda _, args, output: keep(name, output[0] if isinstance(output, tuple) else output)

    hooks = []
    for i in range(plan.geometry.layers):
        down, layer = f.layer(i, f.down), f.layer(i)
        hooks.append(model.get_submodule(down).register_forward_pre_hook(reads(down)))
        hooks.append(model.get_submodule(layer).register_forward_hook(returns(layer)))
    device, total = next(model.parameters()).device, 0.0
    try:
        for batch in progress_bar(ids.split(batch_size), "massive tokens", unit="batch"):
            batch = batch.to(device)
            logits = model(input_ids=prepend(batch, prefix), use_cache=False).logits[:, skip:-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    finally:
        for hook in hooks:
            hook.remove()
    ratios = torch.stack([_to_median(torch.cat(parts)) for parts in sizes.values()]).amax(0)
    massive = ratios > FACTOR
    return Outliers(
        per_text=float(massive.sum() / len(ids)),
        first=float(massive[:, 0].float().mean()),
        tokens=Counter(ids[massive].tolist()),
        ratio=float(ratios.max()),
        nll=total / ids[:, 1:].numel(),
    )


def _to_median(sizes: Tensor) -> Tensor:
    return sizes / sizes.median().clamp(min=1e-12)
