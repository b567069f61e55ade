"""What a quantized model does in another way than its class: set on the object, as accelerate does with ``to``.

transformers asks a quantization method neither for the card of a push nor whether adapters fit, so the model answers.
The class, which float models share, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from .log import get_logger

logger = get_logger(__name__)

NO_ADAPTERS = (
    "a quantized model takes no adapters: their sums would leave the static integer ranges. Call model.dequantize() "
    "first, train the adapter on that float model, merge it (merge_and_unload) and quantize the result; "
    'MobileQuantConfig(finetune="qad") trains the weights inside the rounding'
)


def upload_with_card(model: Any, folder: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """``push_to_hub`` and ``save_pretrained(push_to_hub=True)`` come here with all files and an empty card."""
    from .hub.completed import complete_card  # the Hub's client is slow to import

    complete_card(folder, repo_id, token=kwargs.get("token"))
    return type(model)._upload_modified_files(model, folder, repo_id, *args, **kwargs)


def refuse_adapter(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """``add_adapter`` and ``load_adapter`` mark a model as adapted before they look at it; this one stays savable."""
    raise ValueError(NO_ADAPTERS)


def stay_in_eval(model: Any, mode: bool = True) -> Any:
    """``train``: a module around a quantized teacher may call it, hence a warning; ``Trainer`` refuses by itself."""
    if mode:
        logger.warning(
            "a quantized model cannot be trained, for its integers have no gradients: it stays in evaluation mode. "
            'Train model.dequantize(), or use MobileQuantConfig(finetune="qad")'
        )
    return type(model).train(model, False)


_METHODS: dict[str, Callable[..., Any]] = {
    "_upload_modified_files": upload_with_card,
    "add_adapter": refuse_adapter,
    "load_adapter": refuse_adapter,
    "train": stay_in_eval,
}


def add_methods(model: Any) -> None:
    """Let a quantized model answer for itself; a second call changes nothing."""
    for name, function in _METHODS.items():
        setattr(model, name, partial(function, model))


def remove_methods(model: Any) -> None:
    """For a model that is no longer quantized."""
    for name in _METHODS:
        model.__dict__.pop(name, None)
