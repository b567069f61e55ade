"""torch.compile of transformers' own code, which older versions of torch cannot follow."""

from functools import cache

import pytest
import torch

from tests.tiny import build, probe_ids


@cache
def _why_not() -> str | None:
    try:
        torch.compile(build("llama-gqa"), backend="aot_eager", fullgraph=True)(input_ids=probe_ids())
    except torch._dynamo.exc.Unsupported as error:
        return str(error).splitlines()[0]
    return None


def compiled(model):
    """The model compiled as one graph; skips the test where the float model cannot be."""
    if reason := _why_not():
        pytest.skip(f"torch {torch.__version__} does not compile transformers' own forward pass: {reason}")
    return torch.compile(model, backend="aot_eager", fullgraph=True)
