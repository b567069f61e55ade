"""Round the projections of a student layer by layer, each on what the layers already rounded feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.pack import input_of
from ..log import progress_bar
from ..nn import Mode, set_mode
from ..nn.capture import Stop, layer_inputs
from ..nn.modules import QuantLinear
from ..nn.tunable import TunableWeight
from ..plan import Plan
from ..tune.parameters import encode_anew
from .compensate import Compensation, InputMoments, compensate
from .magr import reduce_magnitude

Rounded = dict[str, dict[str, Tensor]]  # module path -> arguments of TunableWeight.fix
Call = tuple[Tensor, dict[str, Any]]  # hidden states that enter a layer, and its other arguments
Streams = dict[Mode, list[Call]]
Snapshot = Callable[[Rounded, int], None]


@dataclass(frozen=True)
class Method:
    """How :func:`round_layers` rounds.

    Args:
        correct: also correct what the quantized model already lost against the float model (Qronos), else GPTQ.
        magr: reduce the largest weight of each row first (MagR).
    """

    correct: bool
    compensation: Compensation
    magr: bool


@torch.no_grad()
def round_layers(
    student: nn.Module,
    plan: Plan,
    weights: dict[str, TunableWeight],
    train: Tensor,
    method: Method,
    *,
    batch_size: int,
    done: Rounded | None = None,
    layers_done: int = 0,
    snapshot: Snapshot | None = None,
) -> Rounded:
    """Choose the codes of ``weights``, in the order of the data flow.

    The linears that read one activation are rounded together; what they read is computed anew after those before them
    are rounded. Every choice depends on the arguments alone, so a resumed run ends bitwise like an uninterrupted one.

    Args:
        student: transforms and ranges final; its weights are fixed here.
        weights: projections by module path.
        train: int64 ``[sequences, length]``.
        done, layers_done: what the snapshot of an interrupted run holds.
        snapshot: called after each layer but the last.

    Returns:
        module path -> what :meth:`.TunableWeight.fix` takes.
    """
    device = next(student.buffers()).device
    batches = [ids.to(device) for ids in train.split(batch_size)]
    training = student.training
    student.eval()  # one forward pass is stopped half way, which recomputation does not survive
    set_mode(student, Mode.QUANTIZE)
    rounded: Rounded = {}
    for name, parts in (done or {}).items():
        rounded[name] = {key: part.to(device) for key, part in parts.items()}
        weights[name].fix(**rounded[name])
    first = student.get_submodule(plan.family.layer(0))
    streams: Streams = {}
    # The student without rounding is the float model, in the coordinates of its transforms.
    for mode in (Mode.QUANTIZE, Mode.OFF) if method.correct else (Mode.QUANTIZE,):
        set_mode(student, mode)
        streams[mode] = list(zip(*layer_inputs(student, first, batches), strict=True))
    set_mode(student, Mode.QUANTIZE)
    layers = plan.geometry.layers
    for i in progress_bar(range(layers), "round", unit="layer", leave=True):
        layer = student.get_submodule(plan.family.layer(i))
        if i >= layers_done:
            for group in _groups(plan, weights, plan.family.layer(i)):
                moments = _moments(layer, student.get_submodule(group[0]), streams)
                for name in group:
                    rounded[name] = _round(weights[name], moments, method)
                    weights[name].fix(**rounded[name])
            if snapshot is not None and i + 1 < layers:
                snapshot(rounded, i + 1)
        if i + 1 < layers:
            for mode, stream in streams.items():
                set_mode(layer, mode)
                # The layer may round its input in place.
                streams[mode] = [(layer(hidden.clone(), **more), more) for hidden, more in stream]
            set_mode(layer, Mode.QUANTIZE)
    student.train(training)
    return rounded


def _groups(plan: Plan, weights: dict[str, TunableWeight], layer: str) -> list[list[str]]:
    """The linears of a layer, those that read one activation together."""
    groups: dict[str, list[str]] = {}
    for name in weights:
        if name.startswith(f"{layer}."):
            groups.setdefault(input_of(plan, name), []).append(name)
    return list(groups.values())


def _moments(layer: nn.Module, linear: Any, streams: Streams) -> InputMoments:
    """What ``linear`` reads in the quantized layer, and that against what it reads in the float one."""
    hessian = cross = None
    for calls in zip(*streams.values(), strict=True):
        quantized, *plain = (_read(layer, linear, call, mode) for mode, call in zip(streams, calls, strict=True))
        product = (quantized.T @ quantized).double()
        hessian = product if hessian is None else hessian + product
        if plain:
            product = (quantized.T @ plain[0]).double()
            cross = product if cross is None else cross + product
    assert hessian is not None
    return InputMoments(hessian, cross)


def _read(layer: nn.Module, linear: QuantLinear, call: Call, mode: Mode) -> Tensor:
    """What ``linear`` reads when ``layer`` is called so, in ``mode``: float32 ``[tokens, in]``."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0] if linear.input is None else linear.input(args[0]))
        raise Stop

    hook = linear.register_forward_pre_hook(keep)
    set_mode(layer, mode)
    try:
        layer(call[0].clone(), **call[1])
    except Stop:
        pass
    finally:
        hook.remove()
        set_mode(layer, Mode.QUANTIZE)
    return seen.pop().flatten(0, -2).float()


def _round(weight: TunableWeight, moments: InputMoments, method: Method) -> dict[str, Tensor]:
    folded = weight.folded()
    if method.magr:
        folded = reduce_magnitude(folded.double(), moments.hessian).float()
        scale, zero_point, multiplier = encode_anew(weight, folded)
    else:
        scale, zero_point, multiplier = weight.encode(folded, weight.clip)
    step = weight.step(scale, multiplier)
    base = compensate(folded, moments, step, zero_point, weight.spec.grid, method.compensation)
    fixed = {"base": base, "scale": scale, "zero_point": zero_point}
    return fixed if multiplier is None else fixed | {"multiplier": multiplier}
