"""Ways to run a model that depend on the text it reads, and so have no place in a file or a static graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_MARK = "_runs_token_adaptive"


@contextmanager
def token_adaptive_run(model: nn.Module) -> Iterator[None]:
    """Mark a model as one that chooses its precision by token, inside the ``with`` block."""
    marked: Any = model
    setattr(marked, _MARK, True)
    try:
        yield
    finally:
        delattr(marked, _MARK)


def refuse_dynamic(model: nn.Module, what: str) -> None:
    """Refuse a model whose precision is chosen while it runs.

    Args:
        what: cannot hold it, for the message.

    Raises:
        ValueError: it is run so at present.
    """
    if getattr(model, _MARK, False):
        raise ValueError(
            f"the model runs with token-adaptive precision, which {what} cannot hold: which tokens have 4 bits is "
            "known only when the text is, and an NPU's encodings are fixed before. Leave the `with token_adaptive` "
            "block first; it is for CPU and GPU only"
        )
