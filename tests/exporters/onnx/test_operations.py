"""Each operation of an exported graph, alone: from ONNX Runtime's own input codes the integer executor makes the
codes that ONNX Runtime makes. End to end a single flipped code moves all that follows; here none can."""

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters.onnx import REFERENCE, Layout, WeightStore, emit  # noqa: E402
from optimum_mobilequant.exporters.onnx.runtime import cpu_session  # noqa: E402
from optimum_mobilequant.graph.executor import IntegerExecutor  # noqa: E402
from optimum_mobilequant.graph.inputs import DecoderInputs  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.exporters.onnx.test_forms import feeds_of  # noqa: E402
from tests.tiny import FAMILIES, probe_ids  # noqa: E402

LENGTH, CONTEXT = 12, 16
PRESETS = ("w8a8", "w4a8-asym", "w8a16", "w8a8-full", "w8a8+shift", "w8a8-full+shift")


def codes_of_all_tensors(source, folder):
    """Codes that ONNX Runtime computes, by name in the integer graph, in the shapes and dtypes of the executor."""
    with WeightStore(folder / "model.data") as store:
        made = emit(source.graph, Layout.fixed(LENGTH, CONTEXT), REFERENCE, store, name="graph")
    ports = {value.name: value for value in made.model.graph.value_info}
    outputs = {name.removesuffix(".codes"): name for name in ports if name.endswith(".output.codes")}
    outputs |= {
        name.removesuffix(".codes"): name for name in ports if ".self_attn." in name and name.endswith(".codes")
    }
    outputs |= {name.removesuffix(".codes"): name for name in ports if name.endswith(".input.codes")}
    outputs = {name: codes for name, codes in outputs.items() if name in source.graph.values}
    made.model.graph.output.extend(ports[name] for name in outputs.values())
    onnx.save(made.model, folder / "graph.onnx")
    ids = probe_ids(batch=1, length=LENGTH)
    names = [*outputs.values(), "logits"]
    found = cpu_session(folder / "graph.onnx").run(names, feeds_of(source, made, ids))
    codes = dict(zip([*outputs, source.graph.outputs[0]], map(torch.from_numpy, found), strict=True))
    return ids, {name: c if c.dtype == torch.uint8 else c.to(torch.int32) for name, c in codes.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_each_operation_makes_the_executors_codes(variant, preset, tmp_path):
    source = saved.source(variant, preset)
    graph, executor = source.graph, IntegerExecutor.of(source.model)
    ids, found = codes_of_all_tensors(source, tmp_path)
    step = DecoderInputs(source.model)(ids)
    values = {"input_ids": ids, "attention_mask": step.visible, "position_cos": step.cos, "position_sin": step.sin}
    for i, (keys, held) in enumerate(executor.start_cache(1)):
        values |= {f"past_key_{i}": keys, f"past_value_{i}": held}
    compared = 0
    for op in graph.ops:
        expected = executor.run_op(op, values)
        values[op.output] = expected
        if op.output not in found:
            continue  # moved data
        got = found[op.output]
        if got.shape != expected.shape:  # scores over all places of the cache, of which the past ones are hidden
            got = got[..., -expected.shape[-1] :]
        difference = (got.int() - expected.int()).abs()
        bits = graph.values[op.output].encoding.grid.bits
        # 16-bit results of float32 sums may be off by a few codes, 8-bit ones by one at a tie
        assert difference.max() <= (1 if bits == 8 else 4), (op.name, int(difference.max()))
        assert (difference <= (0 if bits == 8 else 1)).float().mean() >= 0.99, op.name
        values[op.output] = got.to(expected.dtype)
        compared += 1
    assert compared >= 2 * 15
