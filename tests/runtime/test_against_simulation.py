"""The fast paths on the demo model: within the documented bound they compute what the simulation does, and texts get
the same perplexity."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import MobileQuantConfig, perplexity, quantize, set_backend
from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.kernels import registry
from optimum_mobilequant.nn import QuantLinear
from optimum_mobilequant.runtime import served, simulated
from tests.tiny import ROOT

DEMO = ROOT / "examples" / "demo_model"
# Perplexities of 4096 tokens: codes on the other side of a boundary scatter them by some tenths of a percent.
SAME = 0.005


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def model(request):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = MobileQuantConfig(
        request.param, recipe="rtn", dataset="python-stdlib", bos=False, samples=8, seq_len=128, batch_size=8
    )
    return quantize(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), tokenizer, config)


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = "\n".join(stdlib_texts("test"))[:20000]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:4096]


@pytest.mark.parametrize("name", ["cpp", "onednn"])
def test_texts_have_the_same_perplexity(model, ids, name):
    if reason := registry.unavailable(name):
        pytest.skip(reason)
    set_backend(model, name)
    used = {layer.backend for layer in served(model)}
    if name not in used:  # oneDNN does not multiply 8-bit weights exactly on every processor
        pytest.skip(f"served by {', '.join(used)} here: {served(model)[0]}")
    found = perplexity(model, None, ids, seq_len=256).perplexity
    with simulated(model):
        expected = perplexity(model, None, ids, seq_len=256).perplexity
    assert abs(found / expected - 1) < SAME


def test_fused_layers_are_the_integer_executor(model, ids):
    if reason := registry.unavailable("cpp"):
        pytest.skip(reason)
    set_backend(model, "cpp")
    executor = IntegerExecutor.of(model)
    codes = executor.forward(ids[None, :64]).logits
    with torch.no_grad():
        logits = model(ids[None, :64]).logits
    assert torch.equal(logits, executor.dequantize(executor.graph.outputs[0], codes))


def test_single_linears_leave_the_simulation_by_one_step_at_most(model, ids):
    set_backend(model, "simulate")
    seen = {}

    def keep(linear, args, output):
        seen[linear] = args[0], output

    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    hooks = [linear.register_forward_hook(keep) for linear in linears]
    with torch.no_grad():
        model(ids[None, :256])
    for hook in hooks:
        hook.remove()
    set_backend(model, "reference")
    changed = total = 0
    with torch.no_grad():
        for linear, (x, expected) in seen.items():
            steps = ((linear.kernel(x) - expected) / linear.output.scale).round()
            assert steps.abs().max() <= 1, linear
            changed, total = changed + int(steps.count_nonzero()), total + steps.numel()
    assert len(seen) == len(linears) == 36 and changed < 1e-3 * total
    set_backend(model, "simulate")
