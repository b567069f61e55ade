"""The operators as torch sees them: schemas, shape functions, tracing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.layers import OUTPUTS, make, use, variants

# A layout of oneDNN's own is opaque to fake tensors, so it is left to the trace below.
VARIANTS = [name for name in variants() if name in ("reference", "simulate")] + [
    name for name in variants() if name.startswith("cpp:")
][:1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_linear_operators(variant, bits, activation_bits, monkeypatch):
    backend = use(variant, monkeypatch)
    layer = make(3, 20, 16, bits=bits, symmetric=False, activation_bits=activation_bits)
    for kind in ("codes", "grid bfloat16"):
        prepared = layer.prepare(OUTPUTS[kind], backend)
        operator = getattr(torch.ops.mobilequant, f"linear_w{bits}a{activation_bits}").default
        torch.library.opcheck(operator, prepared.arguments(layer.x))
        torch.library.opcheck(operator, prepared.arguments(layer.x.view(3, 4, 4)[:, 0].new_zeros(2, 0, 16)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantize_operator(variant, monkeypatch):
    backend = use(variant, monkeypatch)
    for x in (torch.randn(3, 4), torch.randn(4, 3, dtype=torch.bfloat16).t(), torch.randn(0, 4)):
        torch.library.opcheck(torch.ops.mobilequant.quantize.default, (x, 0.1, 100, 8, backend))


@pytest.mark.parametrize("variant", variants())
def test_a_compiled_function_keeps_the_operator(variant, monkeypatch):
    backend = use(variant, monkeypatch)
    layer = make(3, 20, 16, bits=4)
    prepared = layer.prepare(OUTPUTS["codes"], backend)
    seen = []

    def record(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: prepared(x).int() + 1, fullgraph=True, backend=record)
    assert torch.equal(compiled(layer.x), prepared(layer.x).int() + 1)
    assert any("linear_w4a8" in target for target in seen), seen


def test_fake_tensors_get_shape_and_dtype_without_computing():
    layer = make(3, 20, 16)
    arguments = layer.prepare(OUTPUTS["bfloat16"], "reference").arguments(layer.x)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        out = torch.ops.mobilequant.linear_w8a8(*fake)
    assert out.shape == (3, 20) and out.dtype == torch.bfloat16 and type(out) is not torch.Tensor
