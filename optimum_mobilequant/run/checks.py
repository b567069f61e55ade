"""What a model and a device must be before anything is tuned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be tuned: quantized, offloaded, meta or non-finite weights.

    Raises:
        ValueError: names the parameter and the fix.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized:
        raise ValueError("the model is quantized already; load the float model")
    places = set(getattr(model, "hf_device_map", {}).values())
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            "the model is offloaded to disk or split with the CPU; load it with device_map=None (or on one device)"
        )
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices:
        raise ValueError("the model has weights without data (meta device); load it before quantizing")
    if len(devices) > 1:
        raise ValueError(f"the model is spread over {sorted(map(str, devices))}; load it on one device")
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                "the model was loaded under torch.inference_mode(); load it outside, so that it can be tuned"
            )
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name} is {parameter.dtype}: load the float model, not a quantized one")
        if parameter.dtype == torch.float64:
            raise ValueError(
                f"parameter {name} is float64, which tuning in float32 would round; call model.float() first"
            )
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name} holds values that are not finite; the checkpoint is damaged")


def check_device(device: torch.device | str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for "not built in" and "no such card"
        reason = str(error).partition("\n")[0]
        raise ValueError(f'device "{device}" cannot be used here ({reason}); use another one') from error
