"""The integer executor against the simulation, per operation and end to end, and its own invariants."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_mobilequant import quantize
from optimum_mobilequant.graph import KINDS
from optimum_mobilequant.graph.exact import ExactSimulation
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.operators import PREPARE
from optimum_mobilequant.graph.simulation import operation_differences, simulated_codes
from optimum_mobilequant.numerics.integer import Multiplier
from optimum_mobilequant.plan import PRESETS
from tests.tiny import VARIANTS, build, config, probe_ids

# Every family at the default preset, and every preset on the two that differ most in their operations.
CASES = [(variant, "w8a8") for variant in VARIANTS]
CASES += [(variant, preset) for variant in ("qwen2", "stablelm") for preset in PRESETS if preset != "w8a8"]
CASES += [("gemma", "w4a8-asym"), ("qwen3", "w8a16"), ("llama-bias", "w8a8-paper"), ("llama-tied", "w8a8-full")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """A quantized model and its executor."""
    variant, preset = request.param
    model = quantize(build(variant), None, config(preset))
    return model, IntegerExecutor.of(model)


@pytest.fixture(scope="module")
def executor():
    return IntegerExecutor.of(quantize(build("llama-gqa"), None, config()))


def test_every_kind_of_operation_has_a_function():
    assert PREPARE.keys() == KINDS.keys()


def differences(executor, codes):
    """(kind, output, share of codes that differ, largest difference) of each operation fed with ``codes``."""
    for name, found in operation_differences(executor, codes).items():
        yield executor.graph.producer(name).kind, name, found.different / found.codes, found.largest


def test_operations_keep_shapes_and_dtypes(case):
    model, executor = case
    codes = simulated_codes(model, executor, probe_ids())
    for op in executor.graph.ops:
        found = executor.run_op(op, codes)
        assert (found.shape, found.dtype) == (codes[op.output].shape, codes[op.output].dtype), op.output


def test_differences_are_counted(executor):
    codes = dict(executor_trace(executor))
    op = next(op for op in executor.graph.ops if op.kind == "add")
    assert {found.different for found in operation_differences(executor, codes).values()} == {0}
    codes[op.output] = codes[op.output].clone()
    codes[op.output][0, 0, :3] += torch.tensor([1, -4, 2])
    found = operation_differences(executor, codes)[op.output]
    assert (found.different, found.largest, found.codes) == (3, 4, codes[op.output].numel())


def executor_trace(executor):
    trace: dict[str, torch.Tensor] = {}
    ids = probe_ids()
    executor.forward(ids, trace=trace)
    step = executor.inputs(ids)
    trace |= {"input_ids": ids, "attention_mask": step.visible, "position_cos": step.cos, "position_sin": step.sin}
    for i, (keys, values) in enumerate(executor.start_cache(len(ids))):
        trace |= {f"past_key_{i}": keys, f"past_value_{i}": values}
    return trace


def test_each_operation_computes_the_codes_of_the_simulation(case):
    model, executor = case
    shares = {}
    for kind, name, share, largest in differences(executor, simulated_codes(model, executor, probe_ids(4, 24))):
        assert largest <= 1, (kind, name, largest)
        shares.setdefault(kind, []).append(share)
    assert all(sum(found) / len(found) <= 1e-3 for found in shares.values()), shares


def test_without_the_rounding_of_float32_the_whole_model_agrees(case):
    """Float32 moves a value across a rounding boundary now and then, and the layers after it amplify that. In float64
    nearly nothing is moved; what is left are scales whose product with 1/sqrt(D) was rounded to float32."""
    model, executor = case
    ids = probe_ids(4, 24)
    logits, codes = executor.forward(ids).logits, ExactSimulation(model, executor).codes(ids)
    wanted = codes[executor.graph.outputs[0]]
    assert (logits.argmax(-1) == wanted.argmax(-1)).double().mean() >= 0.98
    for kind, name, share, largest in differences(executor, codes):
        # in the first layer a tie comes back with each occurrence of its token
        assert largest <= 1 and share <= (4e-3 if ".layers.0." in name else 1e-3), (kind, name, share, largest)


def test_a_coarser_multiplier_would_be_seen(executor, monkeypatch):
    """Control: with 12 bits instead of 31, codes of 16 bits differ."""
    model = quantize(build("llama-gqa"), None, config())
    real = Multiplier.of

    def coarse(value):
        exact = real(value)
        return Multiplier(exact.mantissa >> 19 << 19, exact.shift)

    monkeypatch.setattr(Multiplier, "of", coarse)
    crude = IntegerExecutor.of(model)
    found = list(differences(crude, ExactSimulation(model, crude).codes(probe_ids(4, 24))))
    assert max(share for kind, _, share, _ in found if kind == "scores") > 0.05


def test_the_logits_follow_the_simulation(case):
    model, executor = case
    ids = probe_ids(4, 24)
    codes = executor.forward(ids).logits
    assert codes.shape == (4, 24, executor.graph.facts["vocabulary"])
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    error = executor.dequantize(executor.graph.outputs[0], codes) - wanted
    assert 10 * torch.log10(wanted.square().sum() / error.square().sum()) >= 20


def test_decoding_equals_prefill_bit_for_bit(case):
    _, executor = case
    ids = probe_ids(2, 14)
    whole = executor.forward(ids)
    for cuts in ([1] * 14, [5, 1, 1, 7], [13, 1]):
        past, logits, start = None, [], 0
        for length in cuts:
            out = executor.forward(ids[:, start : start + length], past=past)
            past, start = out.past, start + length
            logits.append(out.logits)
        assert torch.equal(torch.cat(logits, 1), whole.logits)
        for layer, wanted in zip(past, whole.past, strict=True):
            assert torch.equal(layer[0], wanted[0]) and torch.equal(layer[1], wanted[1])


def test_the_cache_holds_8_bit_codes(case):
    model, executor = case
    eight_bits = all(executor.graph.values[f"past_{part}_0"].encoding.grid.bits == 8 for part in ("key", "value"))
    assert eight_bits
    for keys, values in executor.forward(probe_ids()).past:
        assert keys.dtype is values.dtype is torch.uint8


class NoFloats(TorchDispatchMode):
    """Fails as soon as an operation takes or makes a floating-point tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                raise AssertionError(f"{func} on {leaf.dtype}")
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                raise AssertionError(f"{func} to {leaf}")
        return out


def test_no_float_between_the_inputs_and_the_logits(case):
    _, executor = case
    ids = probe_ids()
    step = executor.inputs(ids)
    with NoFloats():
        first = executor.run(ids, cos=step.cos, sin=step.sin, visible=step.visible)
        executor.forward(ids[:, :1], past=first.past)


def test_the_float_detector_detects(executor):
    """Control: one operation replaced by its float equal is found, and so is a model that computes in floats."""
    ids = probe_ids()
    op = next(op for op in executor.graph.ops if op.kind == "add")
    kept = executor.functions[op.output]
    executor.functions[op.output] = lambda a, b: (kept(a, b).double() / 2 * 2).to(torch.int32)
    try:
        with pytest.raises(AssertionError, match="float64"), NoFloats():
            executor.forward(ids)
    finally:
        executor.functions[op.output] = kept
    with pytest.raises(AssertionError, match="float32"), NoFloats():
        executor.dequantize(executor.graph.outputs[0], executor.forward(ids).logits)
