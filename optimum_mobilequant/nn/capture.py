"""What the first decoder layer is called with: the start of anything that goes through a model layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Ends a forward pass once what is wanted is known."""


@torch.no_grad()
def layer_inputs(
    model: nn.Module, layer: nn.Module, batches: list[Tensor]
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states that enter ``layer``, and its other arguments, for each batch of token ids."""
    hidden: list[Tensor] = []
    options: list[dict[str, Any]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        options.append(kwargs)
        raise Stop

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in batches:
            try:
                model(input_ids=ids, use_cache=False)
            except Stop:
                continue
    finally:
        hook.remove()
    return hidden, options


@torch.no_grad()
def run_layer(layer: nn.Module, inputs: Sequence[Tensor], options: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Outputs for each batch; the layer may round its input in place, so it gets a copy."""
    return [layer(h.clone(), **o) for h, o in zip(inputs, options, strict=True)]
