"""Adaptive smoothing: only channels beyond a threshold are scaled, and the threshold is searched by what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..log import progress_bar
from ..nn import Mode, set_mode
from ..nn.capture import layer_inputs
from ..nn.tunable import LogScale
from ..numerics import Grid, affine_qparams, fake_quantize
from ..plan import Plan
from .edges import Edge

# Thresholds tried: shares of the largest magnitude, evenly spaced in their logarithm. At 1 nothing is scaled.
_SHARES = torch.logspace(0, -2, 33).tolist()
# Sequences that the search reads.
SEQUENCES = 16

Inputs = dict[str, Tensor]  # site -> what its linears read


@torch.no_grad()
def adaptive_scales(
    edges: Sequence[Edge], student: nn.Module, plan: Plan, ids: Tensor, *, batch_size: int
) -> dict[str, Tensor]:
    """Start value of each edge: ``s = max(max|x| / t, 1)`` for each channel, with one threshold t for each site.

    t is the one with the smallest squared error of what the site is for, when its input is rounded to a static
    per-tensor grid and its weights to theirs: the attention's output for q, k, v; act(gate) * up for these two; the
    linear's own output for o and down (QQQ, Zhang et al. 2024, arXiv 2406.09904, section 3.1, with a static input).

    Args:
        edges: of the sites ``norm_qkv``, ``norm_mlp``, ``v_o`` and ``up_down``; none attached to ``student`` yet.
        student: swapped model.
        ids: int64 ``[sequences, length]``; the first ``SEQUENCES`` are read.

    Returns:
        edge name -> natural logarithms, float32 ``[edge.size]``.

    Raises:
        ValueError: an edge of another site.
    """
    if unknown := {e.site for e in edges} - _OUTPUTS.keys():
        raise ValueError(f"adaptive smoothing has no rule for {sorted(unknown)}; it knows {', '.join(_OUTPUTS)}")
    device = next(student.buffers()).device
    training = student.training
    student.eval()
    set_mode(student, Mode.OFF)
    batches = [batch.to(device) for batch in ids[:SEQUENCES].split(batch_size)]
    hidden, options = layer_inputs(student, student.get_submodule(plan.family.layer(0)), batches)
    found: dict[str, Tensor] = {}
    for i in progress_bar(range(plan.geometry.layers), "smooth", unit="layer", leave=True):
        layer = student.get_submodule(plan.family.layer(i))
        site = _Site(student, plan, i)
        inputs: list[Inputs] = []
        for j, (x, more) in enumerate(zip(hidden, options, strict=True)):
            inputs.append({})
            hooks = site.watch(inputs[-1])
            hidden[j] = layer(x.clone(), **more)
            for hook in hooks:
                hook.remove()
        for edge in edges:
            if edge.name.startswith(f"{plan.family.layer(i)}."):
                found[edge.name] = _search(edge, site, [seen[edge.site] for seen in inputs], options)
    student.train(training)
    set_mode(student, Mode.QUANTIZE)
    return {edge.name: found[edge.name] for edge in edges}


class _Site:
    """The modules of one layer."""

    def __init__(self, student: nn.Module, plan: Plan, i: int):
        f = plan.family

        def part(name: str) -> Any:
            return student.get_submodule(f.layer(i, name))

        self.student, self.plan = student, plan
        self.attention, self.out, self.gate, self.up = part(f.attention), part(f.out), part(f.gate), part(f.up)
        self.down, self.activation = part(f.down), part(f.activation)
        self.readers = {
            "norm_qkv": part(f.query), "norm_mlp": self.gate, "v_o": self.out, "up_down": self.down,
        }  # fmt: skip

    def watch(self, seen: Inputs) -> list[Any]:
        def keep(site: str) -> Callable[[Any, Any], None]:
            return lambda _, args: seen.__setitem__(site, args[0])

        return [module.register_forward_pre_hook(keep(site)) for site, module in self.readers.items()]


_OUTPUTS: dict[str, Callable[[_Site, Tensor, dict[str, Any]], Tensor]] = {
    "norm_qkv": lambda site, x, options: site.attention(hidden_states=x, **options)[0],
    "norm_mlp": lambda site, x, options: site.activation(site.gate(x)) * site.up(x),
    "v_o": lambda site, x, options: site.out(x),
    "up_down": lambda site, x, options: site.down(x),
}


def _search(edge: Edge, site: _Site, inputs: list[Tensor], options: list[dict[str, Any]]) -> Tensor:
    """Log-scales of the best threshold."""
    output = _OUTPUTS[edge.site]
    readers = [effect for effect in edge.effects if effect.dim == "columns"]
    index = None if readers[0].index is None else readers[0].index.to(inputs[0].device)
    modules: list[Any] = [site.student.get_submodule(effect.module) for effect in readers]
    grid = site.plan.activations[edge.activation].grid
    magnitude = torch.stack([x.flatten(0, -2).abs().amax(0) for x in inputs]).amax(0)
    if index is not None:
        magnitude = torch.zeros(edge.size, device=magnitude.device).scatter_reduce_(0, index, magnitude, "amax")
    exact = [output(site, x, o) for x, o in zip(inputs, options, strict=True)]
    best, best_error = torch.zeros_like(magnitude), float("inf")
    for share in _SHARES:
        log = (magnitude / (share * magnitude.max()).clamp(min=1e-30)).clamp(min=1.0).log()
        spread = log if index is None else log[index]
        scaled = _round_inputs([x / spread.exp() for x in inputs], grid)
        scale = LogScale(nn.Parameter(log), 1, index)
        for module in modules:
            module.weight.columns_log.append(scale)
            module.weight.mode = Mode.QUANTIZE
        error = sum(
            float((output(site, x, o) - y).double().square().sum())
            for x, o, y in zip(scaled, options, exact, strict=True)
        )
        for module in modules:
            module.weight.columns_log.pop()
            module.weight.mode = Mode.OFF
        if error < best_error:
            best, best_error = log, error
    return best.float()


def _round_inputs(inputs: list[Tensor], grid: Grid) -> list[Tensor]:
    """Rounded to one static range over all of them."""
    low, high = (torch.stack([end(x) for x in inputs]) for end in (torch.min, torch.max))
    scale, zero_point = affine_qparams(low.amin(), high.amax(), grid)
    return [fake_quantize(x, scale, zero_point, grid) for x in inputs]
