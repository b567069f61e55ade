"""The end-to-end training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..log import get_logger, progress_bar

logger = get_logger(__name__)

# Rates fall along a cosine to this share of their start (paper: 1e-3 -> 1e-4).
FINAL_RATE = 0.1
# Rounding makes each step's gradient noisy; what is validated and kept is the running mean of about 1 / (1 - AVERAGE)
# steps (Polyak averaging).
AVERAGE = 0.95


@dataclass
class LearnResult:
    """Losses of a tuning run: ``history`` holds (step, validation loss)."""

    start: float
    best: float
    best_step: int
    seconds: float
    history: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LearnResult:
        """Inverse of ``vars``, through JSON."""
        result = cls(**data)
        result.history = [(int(step), float(value)) for step, value in result.history]
        return result

    def refuse_if_worse(self) -> None:
        """Raise RuntimeError when the validation loss ended above its start."""
        if self.best > self.start:
            raise RuntimeError(
                f"tuning made the model worse: validation loss {self.start:.5g} -> {self.best:.5g}. Lower the "
                f'learning rates (lr_transforms, lr_clips, lr_ranges), give more text, or use tuning="end-to-end", '
                f"which keeps the best state it has seen"
            )


class Trainable(Protocol):
    """What the loop trains: :class:`.parameters.Learnables`, :class:`.rounding.Rounding` or
    :class:`.finetune.Finetune`."""

    ranges: nn.Parameter

    def bind(self, student: nn.Module) -> None: ...
    def release(self, student: nn.Module) -> None: ...
    def groups(self, rates: Mapping[str, float], prefix: str = "") -> list[dict[str, object]]: ...
    def clamp(self) -> None: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...


Loss = Callable[[Tensor], Tensor]
Snapshot = Callable[[dict[str, Tensor], dict[str, Any]], None]


def learn_end_to_end(
    learnables: Trainable,
    student: nn.Module,
    loss_of: Loss,
    train: Tensor,
    validation: Tensor,
    *,
    steps: int,
    batch_size: int,
    eval_every: int,
    rates: dict[str, float],
    seed: int,
    resume: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    snapshot: Snapshot | None = None,
    prefix: str = "",
    description: str = "learn",
    warmup: int = 0,
) -> LearnResult:
    """Minimise ``loss_of`` with AdamW; leave the best validated parameters in ``learnables``.

    The batch of step n depends on (seed, n) alone and the snapshot holds parameters, moments and the best state, so an
    interrupted run that resumes ends bitwise where an uninterrupted one ends.

    Args:
        loss_of: ids ``[batch, length]`` -> 0-dim loss, for the parameters as bound.
        train, validation: int64 ``[sequences, length]``.
        eval_every: steps between validations; a snapshot is taken at each.
        rates: start rates of the groups of ``learnables`` (0 freezes a group).
        warmup: steps over which the rates rise from 0, for a start that is good already: Adam's first steps move every
            parameter by its whole rate, however small the gradient.
        prefix: train only the parameters of modules below this path (block-wise tuning).

    Raises:
        FloatingPointError: a loss or gradient is not finite; names the step and the remedy.
    """
    groups = learnables.groups(rates, prefix)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0) if groups else None
    device = next(student.buffers()).device
    started = time.monotonic()

    def validate() -> float:
        return mean_loss(learnables, student, loss_of, validation, batch_size)

    first, result, best, mean = 0, LearnResult(0.0, 0.0, 0, 0.0), _state(learnables), _state(learnables)
    if resume is not None:
        first, result, best, mean = _restore(learnables, optimizer, *resume)
        started -= result.seconds
    else:
        result.start = result.best = validate()
        result.history.append((0, result.start))
    if optimizer is None:
        return result

    bar = progress_bar(range(first, steps), description, total=steps, initial=first, unit="step", leave=True)
    with torch.enable_grad():
        for step in bar:
            progress, rise = step / steps, min(1.0, (step + 1) / (warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = (
                    rates[group["name"]]
                    * rise
                    * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))
                )
            ids = train[batch_index(len(train), batch_size, step, seed)].to(device)
            learnables.bind(student)
            loss = loss_of(ids)
            loss.backward()
            if not torch.isfinite(loss):
                where = first_broken(student, loss_of, ids)
                raise FloatingPointError(f"loss is {loss.item()} at step {step}{where}; lower the learning rates")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            learnables.clamp()
            done = step + 1
            now = _state(learnables)
            weight = max(1 - AVERAGE, 1 / done)  # a plain mean until the window is full
            mean = {name: torch.lerp(mean[name], value, weight) for name, value in now.items()}
            if done % eval_every == 0 or done == steps:
                learnables.load_state_dict(mean)
                value = validate()
                learnables.load_state_dict(now)
                result.history.append((done, value))
                if value < result.best:
                    result.best, result.best_step, best = value, done, mean
                result.seconds = time.monotonic() - started
                bar.set_postfix(validation=f"{value:.4g}", start=f"{result.start:.4g}")
                if snapshot is not None and done < steps:
                    snapshot(*_snapshot({"now": now, "mean": mean, "best": best}, optimizer, done, result))
    learnables.load_state_dict(best)
    result.seconds = time.monotonic() - started
    logger.info(
        f"{description}: validation loss {result.start:.4g} -> {result.best:.4g}, best at step {result.best_step} "
        f"of {steps}; {result.seconds:.0f} s"
    )
    return result


@torch.no_grad()
def first_broken(student: nn.Module, loss_of: Loss, ids: Tensor) -> str:
    """The first module of the data flow whose output holds NaN or plus infinity, as ``", first in NAME"``; else ""."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            # masked scores are minus infinity
            if not found and isinstance(output, Tensor) and not bool((output < torch.inf).all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in student.named_modules() if name]
    try:
        loss_of(ids)
    finally:
        for handle in handles:
            handle.remove()
    return f", first in {found[0]}" if found else ""


@torch.no_grad()
def mean_loss(learnables: Trainable, student: nn.Module, loss_of: Loss, ids: Tensor, batch_size: int) -> float:
    """Mean of ``loss_of`` over the sequences ``ids``, for the present parameters.

    Raises:
        FloatingPointError: it is not finite.
    """
    device = next(student.buffers()).device
    learnables.bind(student)
    losses = [loss_of(part.to(device)) * len(part) for part in ids.split(batch_size)]
    value = float(torch.stack(losses).sum() / len(ids))
    if not math.isfinite(value):
        raise FloatingPointError("the validation loss is not finite; lower the learning rates or check the model")
    return value


def batch_index(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Rows of batch ``step``: passes over seeded permutations, a new one each epoch."""
    rows: list[Tensor] = []
    position, wanted = step * batch_size, min(batch_size, count)
    while wanted > 0:
        epoch, offset = divmod(position, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows.append(order[offset : offset + wanted])
        position, wanted = position + len(rows[-1]), wanted - len(rows[-1])
    return torch.cat(rows)


def _state(learnables: Trainable) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in learnables.state_dict().items()}


def _snapshot(
    states: dict[str, dict[str, Tensor]], optimizer: torch.optim.Optimizer, step: int, result: LearnResult
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"{kind}.{k}": v for kind, state in states.items() for k, v in state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    return tensors, {"step": step, "result": vars(result)}


def _restore(
    learnables: Trainable,
    optimizer: torch.optim.Optimizer | None,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
) -> tuple[int, LearnResult, dict[str, Tensor], dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "mean": {}, "best": {}, "adam": {}}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        # Adam's step counter stays where the optimizer wants it; load_state_dict moves the moments.
        parts[kind][name] = tensor if kind == "adam" else tensor.to(learnables.ranges.device)
    learnables.load_state_dict(parts["now"])
    if optimizer is not None and parts["adam"]:
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts["adam"].items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"]), LearnResult.from_dict(meta["result"]), parts["best"], parts["mean"]
