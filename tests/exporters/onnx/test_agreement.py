"""Exported graphs in ONNX Runtime against the simulation, for every family."""

import shutil

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from optimum_mobilequant.exporters.onnx.runtime import OnnxModel, logits_runner  # noqa: E402
from optimum_mobilequant.exporters.onnx.write import GRAPHS  # noqa: E402
from optimum_mobilequant.graph import simulation  # noqa: E402
from optimum_mobilequant.graph.executor import IntegerExecutor  # noqa: E402
from tests.exporters.onnx import saved  # noqa: E402
from tests.tiny import FAMILIES, probe_ids  # noqa: E402

# One family of each kind of operation at the presets that change the graph's types.
CASES = [(family, "w8a8") for family in FAMILIES]
CASES += [("llama-gqa", "w4a8"), ("llama-bias", "w4a8-asym"), ("llama-mqa", "w8a8-paper")]
CASES += [(family, preset) for family in ("qwen2", "qwen3", "stablelm") for preset in ("w8a8-full", "w8a16")]
CASES += [("llama-mqa", "w8a8+shift"), ("qwen2", "w8a8-full+shift"), ("stablelm", "w8a16+shift")]


def relative(found, expected):
    return ((found - expected).float().norm() / (expected - expected.float().mean()).norm()).item()


@pytest.mark.parametrize(("variant", "preset"), CASES)
def test_codes_of_the_logits_equal_the_simulation(variant, preset):
    # 24 tokens: three chunks of the prompt graph
    ids = probe_ids(batch=4, length=24)
    run = logits_runner(saved.exported(variant, preset))
    found, expected = run(ids), saved.simulated_codes(variant, preset, ids)
    assert found.shape == expected.shape and found.dtype == torch.int32
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.99
    if preset.startswith("w8a8-full"):
        assert (found == expected).float().mean() >= 0.999 and (found - expected).abs().max() <= 1
    else:  # a code that rounds the other way moves what follows by a few 16-bit steps
        assert relative(found, expected) <= 1e-2


def test_a_changed_scale_is_seen(tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(saved.exported(), folder)
    for name in ("prompt", "token"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        (scale,) = [i for i in model.graph.initializer if i.name == "model.layers.1.mlp.down_proj.input.scale"]
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 3, scale.name))
        onnx.save(model, folder / f"{name}.onnx")
    ids = probe_ids(batch=4, length=24)
    expected = saved.simulated_codes("llama-gqa", "w8a8", ids)
    assert relative(logits_runner(folder)(ids), expected) > 5e-2
    assert relative(logits_runner(saved.exported())(ids), expected) <= 1e-2


@pytest.mark.parametrize(("variant", "preset"), [("llama-gqa", "w8a8-full"), ("qwen3", "w8a8-full")])
def test_chunks_and_single_tokens_give_the_same_codes_and_cache(variant, preset):
    """21 tokens: whole chunks, a padded one, and the same token by token."""
    ids = probe_ids(batch=1, length=21)[0].numpy()
    chunked, single = (OnnxModel(saved.exported(variant, preset)) for _ in range(2))
    at_once = chunked.step(ids)
    one_by_one = np.concatenate([single.step(ids[i : i + 1]) for i in range(len(ids))])
    assert np.array_equal(at_once, one_by_one)
    for name, held in chunked.cache.items():
        assert np.array_equal(held, single.cache[name]), name
    # what a step leaves in the cache is what the simulation computes
    model = saved.source(variant, preset).model
    codes = simulation.simulated_codes(model, IntegerExecutor.of(model), torch.from_numpy(ids)[None])
    for i in range(2):
        keys, values = chunked.cache[f"past_key_{i}_in"][:, 0, :, :21], chunked.cache[f"past_value_{i}_in"][:, 0, :21]
        attention = f"model.layers.{i}.self_attn"
        expected = codes[f"{attention}.key_rotated"][0].transpose(1, 2), codes[f"{attention}.v_proj.heads"][0]
        for held, wanted in zip((keys, values), expected, strict=True):
            assert (held == wanted.numpy()).mean() >= 0.999


def test_the_context_can_be_filled_to_its_last_token_and_not_beyond():
    ids = probe_ids(batch=1, length=saved.CONTEXT)[0]
    model = OnnxModel(saved.exported("llama-gqa", "w8a8-full"))
    found = torch.from_numpy(model.step(ids.numpy()).astype(np.int32))
    expected = saved.simulated_codes("llama-gqa", "w8a8-full", ids[None])[0]
    assert (found == expected).float().mean() >= 0.999
    with pytest.raises(ValueError, match="do not fit in the exported context of 32"):
        model.step(ids[:1].numpy())
    model.reset()
    with pytest.raises(ValueError, match="token ids must lie in 0 to 95"):
        model.step(np.array([96]))


def test_what_unused_places_of_the_cache_hold_has_no_influence():
    """Runtimes fill them with other codes than the zero point (Genie: 128)."""
    ids = probe_ids(batch=1, length=11)[0].numpy()
    plain, other = (OnnxModel(saved.exported()) for _ in range(2))
    for held in other.cache.values():
        held[...] = np.random.default_rng(0).integers(0, 256, held.shape)
    assert np.array_equal(plain.step(ids), other.step(ids))


def test_float_inputs_and_outputs_give_the_same_values(tmp_path):
    from optimum_mobilequant.exporters.onnx import Form, write_graphs
    from optimum_mobilequant.exporters.onnx.write import write_callers_files
    from optimum_mobilequant.exporters.options import ExportOptions

    source, options = saved.source(), ExportOptions(context=saved.CONTEXT, prompt_length=saved.PROMPT)
    write_callers_files(source, tmp_path, options, write_graphs(source, tmp_path, options, Form(integer_io=False)))
    floats = logits_runner(tmp_path)
    assert floats.encoding is None and '"type": "uint8"' not in (tmp_path / GRAPHS).read_text()
    ids = probe_ids(batch=2, length=12)
    integers = logits_runner(saved.exported())
    values = (integers(ids) - integers.encoding.zero_point) * integers.encoding.scale
    assert torch.allclose(floats(ids), values, rtol=0, atol=1e-6)
