"""What the comparison of speeds reports and refuses; the speeds themselves are not tested."""

import importlib.util
import json

import pytest
import torch
from torch import nn

from optimum_mobilequant import bench, cli, quantize
from optimum_mobilequant.bench import peers as peers_module
from optimum_mobilequant.bench.runners import TransformersRunner, resident_bytes
from tests.tiny import build, config, probe_ids

SIZES = {"prompt": 8, "tokens": 4, "repeat": 1, "threads": 1}
GRAPHS = ("prompt.onnx", "token.onnx")
ROW = {"prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "resident_weight_bytes"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    wide = {
        "hidden_size": 128,
        "intermediate_size": 256,
    }  # kernels pad narrow matrices, which would hide what 4 bits save
    quantize(build("llama-gqa", **wide), None, config("w4a8")).save_pretrained(folder)
    return folder


def test_every_contender_is_measured_against_the_checkpoint(checkpoint):
    found = bench.compare_speed(checkpoint, ["bf16", "quanto"], **SIZES)
    assert found["contenders"].keys() == {"mobilequant", "bf16", "quanto"}
    assert all(row.keys() == ROW for row in found["contenders"].values())
    assert all(value > 0 for row in found["contenders"].values() for value in row.values() if value is not None)
    assert found["ratios"].keys() == {"bf16", "quanto"}
    for name, ratio in found["ratios"].items():
        own, other = found["contenders"]["mobilequant"], found["contenders"][name]
        # with one repetition the median ratio is the ratio of the medians
        assert ratio["prefill"] == pytest.approx(own["prefill_tokens_per_s"] / other["prefill_tokens_per_s"])
        assert ratio["decode"] == pytest.approx(own["decode_tokens_per_s"] / other["decode_tokens_per_s"])
    assert found["ratios"]["bf16"]["resident_weights"] < 0.8
    assert found["weight_bits"] == 4 and len(found["load_average"]) == 2
    assert torch.get_num_threads() == 1


def test_onnxruntime_takes_part(checkpoint):
    pytest.importorskip("onnxruntime", reason="the peer needs it")
    pytest.importorskip("onnx", reason="exporting needs it")
    found = bench.compare_speed(checkpoint, ["onnxruntime"], **SIZES)
    assert found["contenders"]["onnxruntime"]["resident_weight_bytes"] > 1000


def test_onnxruntime_with_4_bit_weights_computes_the_same_model(checkpoint, tmp_path):
    pytest.importorskip("onnxruntime", reason="the peer needs it")
    onnx = pytest.importorskip("onnx", reason="exporting needs it")
    pytest.importorskip("onnx_ir", reason="ONNX Runtime's quantizer needs it")
    subject = peers_module.Subject(checkpoint, 4, tmp_path, 8, 4, 1)
    runner = peers_module.PEERS["onnxruntime-int4"].make(subject)
    graphs = [onnx.load(tmp_path / "onnx-int4" / name, load_external_data=False) for name in GRAPHS]
    products = [[node for node in graph.graph.node if node.op_type == "MatMulNBits"] for graph in graphs]
    assert len(products[0]) == len(products[1]) == 15  # every projection and the head
    levels = {a.i for node in (*products[0], *products[1]) for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    model, ids = subject.float_model(torch.float32), probe_ids(length=8)[0]
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0].numpy()
    runner._model.reset()
    found = runner._model.step(ids.numpy())
    assert abs(found - expected).mean() < 0.2 * abs(expected).mean()
    longer = torch.cat([ids, torch.tensor([5])])
    with torch.no_grad():
        after = model(input_ids=longer[None]).logits[0, -1].numpy()
    assert abs(runner._model.step(longer[-1:].numpy())[0] - after).mean() < 0.2 * abs(after).mean()


def test_float32_takes_part_and_peers_may_be_loaded_one_by_one(checkpoint):
    found = bench.compare_speed(checkpoint, ["bf16", "fp32"], **SIZES, apart=True)
    assert found["contenders"].keys() == {"mobilequant", "bf16", "fp32"} and found["apart"]
    assert found["ratios"].keys() == {"bf16", "fp32"}
    sizes = {name: row["resident_weight_bytes"] for name, row in found["contenders"].items()}
    assert sizes["fp32"] == pytest.approx(2 * sizes["bf16"], rel=0.05)


@pytest.mark.parametrize("name", ["torchao", "torchao-int8", "torchao-int4"])
def test_torchao_takes_part(checkpoint, name):
    pytest.importorskip("torchao", reason="the peer needs it")
    assert bench.compare_speed(checkpoint, [name], **SIZES)["ratios"][name]["decode"] > 0


def test_ratios_are_medians_of_the_repetitions_own():
    ours = bench.Speed(50, prefill=[1.0, 20.0, 3.0], decode=[1.0, 1.0, 1.0], peak_bytes=100)
    peer = bench.Speed(100, prefill=[2.0, 10.0, 1.0], decode=[4.0, 2.0, 2.0], peak_bytes=100)
    assert ours.ratios(peer) == {"prefill": 2.0, "decode": 0.5, "resident_weights": 0.5, "peak": 1.0}
    assert ours.summary()["prefill_tokens_per_s"] == 3.0


def test_a_runner_writes_what_generate_writes():
    model = build("llama-gqa").eval()
    ids, runner = probe_ids(length=6)[:1], TransformersRunner(model)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:]
    for _ in range(2):  # a prompt starts anew
        written = [runner.read(ids[0])]
        while len(written) < 4:
            written.append(runner.write(written[-1]))
        assert written == expected.tolist()


def test_weights_are_counted_once_and_inside_subclasses():
    from optimum.quanto import freeze, qint8
    from optimum.quanto import quantize as quanto

    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    assert resident_bytes(model) == 2 * 64 * 64 * 4
    model[1].weight = model[0].weight
    assert resident_bytes(model) == 64 * 64 * 4
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    quanto(model, weights=qint8)
    freeze(model)
    assert 64 * 64 <= resident_bytes(model) < 64 * 64 * 1.2


# -- refused before any work ------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    def work(*args):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("optimum_mobilequant.bench.compare.load", work)


def test_a_peer_that_is_not_installed_names_the_command(checkpoint, monkeypatch, no_work):
    find = importlib.util.find_spec
    missing = "torchao"
    monkeypatch.setattr(peers_module.importlib.util, "find_spec", lambda n, *a: None if n == missing else find(n, *a))
    with pytest.raises(ImportError, match="torchao.*pip install torchao"):
        bench.compare_speed(checkpoint, ["bf16", "torchao"], **SIZES)


def test_bad_input(checkpoint, tmp_path, no_work):
    with pytest.raises(ValueError, match='"quant" is unknown.*quanto'):
        bench.compare_speed(checkpoint, ["quant"], **SIZES)
    with pytest.raises(ValueError, match="no config.json"):
        bench.compare_speed(tmp_path, ["bf16"], **SIZES)
    build("llama-gqa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not quantized by optimum-mobilequant"):
        bench.compare_speed(tmp_path, ["bf16"], **SIZES)
    with pytest.raises(ValueError, match="the model has 64 positions"):
        bench.compare_speed(checkpoint, ["bf16"], **SIZES | {"prompt": 61})
    with pytest.raises(ValueError, match="tokens must be above 2"):
        bench.compare_speed(checkpoint, ["bf16"], **SIZES | {"tokens": 2})


def test_command(checkpoint, capsys):
    words = ["bench", str(checkpoint), "--against", "bf16", "--prompt", "8", "--tokens", "4", "--repeat", "1"]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratios"].keys() == {"bf16"}
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("mobilequant") and lines[3].startswith("bf16") and "x)" in lines[3]
    assert cli.main([*words[:2], "--against", "bf61"]) == 2
    assert "bf16" in capsys.readouterr().err
