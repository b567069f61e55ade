"""compare(): the same numbers as elsewhere, measures that see a difference, one clear error for each bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import cli, perplexity, quantize
from optimum_mobilequant.evaluate import runners
from optimum_mobilequant.evaluate.compare import compare
from optimum_mobilequant.graph.load import load_graph
from tests import tiny

IDS = [token for row in tiny.token_ids(4, 24, seed=5) for token in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``checkpoint``, the ``float`` model it is made from, and a text."""
    folder = tmp_path_factory.mktemp("compare")
    float_model = tiny.build("llama-gqa")
    float_model.save_pretrained(folder / "float")
    quantize(tiny.build("llama-gqa"), None, tiny.config()).save_pretrained(folder / "checkpoint")
    vocabulary = {"<unk>": 0} | {chr(32 + index): index for index in range(1, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "checkpoint")
    (folder / "text.txt").write_text("The dog met a cat and they went to the park. " * 8, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    options = {"float_model": str(folder / "float"), "float32": True, "seq_len": 24, "progress": False}
    return compare(folder / "checkpoint", IDS, **options)


def test_each_runner_has_the_perplexity_of_its_model(folder, found):
    assert list(found.runners) == ["float", "simulate", "float32", "integer"]
    model = load_graph(folder / "checkpoint").model
    for name, of in (("float32", model), ("float", tiny.build("llama-gqa"))):
        wanted = perplexity(of, None, IDS, seq_len=24, progress=False)
        assert found.runners[name].perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
        assert found.runners[name].tokens == wanted.tokens == 4 * 23
    assert found.runners["float32"].perplexity != found.runners["simulate"].perplexity
    simulated = found.runners["simulate"].perplexity
    assert found.runners["integer"].perplexity == pytest.approx(simulated, rel=2e-2)
    assert found.runners["integer"].perplexity != found.runners["float32"].perplexity  # not one run shown twice


def test_pairs_name_the_runner_and_its_reference(found):
    assert list(found.pairs)[:3] == ["simulate/float", "float32/float", "integer/float"]
    assert list(found.pairs)[3:] == ["float32/simulate", "integer/simulate", "integer/float32"]
    # Float32 moves codes; integers hardly do.
    assert found.pairs["integer/simulate"].equal > max(0.9, found.pairs["float32/simulate"].equal)
    close, far = found.pairs["integer/float32"], found.pairs["integer/float"]
    assert close.sqnr_db > far.sqnr_db + 3
    assert close.argmax >= 0.9 and close.max_lsb > 0 and 0 < close.equal < 1
    assert far.max_lsb is None and far.equal is None  # floats are on no grid


class Shifted:
    """The simulation, ``steps`` higher at one logit of each position."""

    def __init__(self, request, steps):
        self.inner = runners.RUNNERS["simulate"](request)
        self.encoding, self.steps = self.inner.encoding, steps

    def __call__(self, ids):
        codes = self.inner(ids).clone()
        codes[..., 7] += self.steps
        return codes


@pytest.mark.parametrize(("steps", "argmax"), [(0, 1.0), (5, None), (40000, 0.0)])
def test_the_measures_of_a_pair(folder, monkeypatch, steps, argmax):
    monkeypatch.setitem(runners.RUNNERS, "integer", lambda request: Shifted(request, steps))
    found = compare(folder / "checkpoint", IDS, seq_len=24, progress=False)
    pair = found.pairs["integer/simulate"]
    assert pair.max_lsb == steps
    assert pair.equal == pytest.approx(1.0 if steps == 0 else 1 - 1 / tiny.VOCAB)
    loaded = load_graph(folder / "checkpoint")
    with torch.no_grad():
        logits = loaded.model(torch.tensor(IDS).view(4, 24), use_cache=False).logits
    scale = float(loaded.graph.values[loaded.graph.outputs[0]].encoding.scale)
    noise = 4 * 24 * (steps * scale) ** 2
    wanted = math.inf if steps == 0 else 10 * math.log10(float(logits.double().square().sum()) / noise)
    assert pair.sqnr_db == pytest.approx(wanted, rel=1e-5)
    top = torch.stack([logits[..., 7], logits.index_fill(-1, torch.tensor(7), -1e9).amax(-1)])
    if argmax == 0.0:
        assert pair.argmax == pytest.approx(float((top[0] > top[1]).double().mean()))
    elif argmax == 1.0:
        assert pair.argmax == 1.0


def test_runners_that_return_floats_are_compared_without_steps(folder, monkeypatch):
    def as_floats(request):
        inner = runners.RUNNERS["simulate"](request)
        scale, zero = inner.encoding.scale, inner.encoding.zero_point
        return runners.Runner(lambda ids: (inner(ids) - zero) * scale)

    monkeypatch.setitem(runners.RUNNERS, "onnx", as_floats)
    pair = compare(folder / "checkpoint", IDS, seq_len=24, progress=False).pairs["onnx/simulate"]
    assert pair.max_lsb is None and pair.sqnr_db == math.inf and pair.argmax == 1.0


def test_tokens_limit_the_text(folder):
    found = compare(folder / "checkpoint", IDS, seq_len=24, tokens=50, progress=False)
    assert found.runners["integer"].tokens == 2 * 23


def test_batches_do_not_change_the_result(folder):
    one, four = (compare(folder / "checkpoint", IDS, seq_len=24, batch_size=size, progress=False) for size in (1, 4))
    assert one.runners["integer"].perplexity == pytest.approx(four.runners["integer"].perplexity, rel=1e-12)


def bad(folder, match, error=ValueError, **options):
    options = {"checkpoint": folder / "checkpoint", "text_or_ids": IDS, "seq_len": 24, "progress": False} | options
    with pytest.raises(error, match=match):
        compare(options.pop("checkpoint"), options.pop("text_or_ids"), **options)


def test_bad_inputs_are_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("optimum_mobilequant.evaluate.compare.load_graph", fail)
    bad(folder, "is a float model", checkpoint=folder / "float")
    bad(folder, "no config.json", FileNotFoundError, checkpoint=tmp_path / "none")
    bad(folder, "no folder", FileNotFoundError, onnx=tmp_path / "none")
    bad(folder, "onnx_float64 needs an export", onnx_float64=True)
    bad(folder, "beyond the model's 64 positions", seq_len=65)
    bad(folder, "at least 2", seq_len=1)
    bad(folder, "tokens at least seq_len", tokens=23)
    bad(folder, "is quantized", float_model=str(folder / "checkpoint"))
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    bad(folder, "quantized by 'gptq'", checkpoint=other)
    config["quantization_config"] = {"quant_method": "quanto"}
    (other / "config.json").write_text(json.dumps(config))
    (other / "quanto_qmap.json").write_text("{}")
    bad(folder, "activations .* are floats", checkpoint=other)


def test_texts_and_float_models_that_do_not_fit_are_refused(folder, tmp_path):
    bad(folder, "the text has 20 tokens, but one chunk takes 24", text_or_ids=IDS[:20])
    tiny.build("llama-gqa", vocab_size=80).save_pretrained(tmp_path / "small")
    bad(folder, "has 80 tokens and the checkpoint 96", float_model=str(tmp_path / "small"))


def test_an_export_of_another_checkpoint_or_for_fewer_tokens_is_refused(folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is an extra")
    pytest.importorskip("onnx", reason="onnx is an extra")
    from optimum_mobilequant.exporters import export

    export(folder / "checkpoint", "onnx", tmp_path / "onnx", context=24, prompt_length=8)
    options = {"onnx": tmp_path / "onnx", "onnx_float64": True, "seq_len": 24, "progress": False}
    found = compare(folder / "checkpoint", IDS, **options)
    assert found.pairs["onnx/simulate"].argmax >= 0.9
    assert found.pairs["onnx_float64/integer"].equal > max(0.99, found.pairs["onnx/integer"].equal)
    assert found.pairs["onnx/integer"].max_lsb is not None
    bad(folder, "exported for 24 tokens, windows have 32", onnx=tmp_path / "onnx", seq_len=32)
    quantize(tiny.build("llama-gqa", seed=3), None, tiny.config()).save_pretrained(tmp_path / "other")
    bad(folder, "from another checkpoint", checkpoint=tmp_path / "other", onnx=tmp_path / "onnx")


def test_the_command_stores_the_check_of_an_export_for_the_card(folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is an extra")
    pytest.importorskip("onnx", reason="onnx is an extra")
    from optimum_mobilequant.exporters import export
    from optimum_mobilequant.hub.facts import read_exports

    out = tmp_path / "onnx"
    export(folder / "checkpoint", "onnx", out, context=16, prompt_length=8)
    options = ["--text", str(folder / "text.txt"), "--onnx", str(out), "--seq-len", "16", "--tokens", "32", "--json"]
    before = (out / "export.json").read_bytes()
    assert cli.main(["compare", str(folder / "checkpoint"), *options, "--no-record"]) == 0
    assert (out / "export.json").read_bytes() == before
    assert read_exports(folder / "checkpoint", [out])[0].checked is None
    capsys.readouterr()
    assert cli.main(["compare", str(folder / "checkpoint"), *options]) == 0
    pair = json.loads(capsys.readouterr().out)["pairs"]["onnx/integer"]
    checked = read_exports(folder / "checkpoint", [out])[0].checked
    assert checked.startswith("in ONNX Runtime against the integer executor on text.txt, 30 predictions, ")
    assert f"{100 * pair['equal']:.2f} % of their codes equal" in checked
    record = json.loads((out / "export.json").read_text())
    del record["summary"]["checked"]
    assert record == json.loads(before)


def test_the_command_prints_json(folder, capsys):
    options = ["--text", str(folder / "text.txt"), "--float", str(folder / "float"), "--seq-len", "16"]
    assert cli.main(["compare", str(folder / "checkpoint"), *options, "--tokens", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["float", "simulate", "integer", "pairs"]
    assert found["integer"]["tokens"] == 4 * 15 and found["integer"]["perplexity"] > 1
    assert set(found["pairs"]["integer/simulate"]) == {"sqnr_db", "argmax", "max_lsb", "equal"}


def test_the_command_prints_a_table(folder, capsys):
    options = ["--text", str(folder / "text.txt"), "--seq-len", "16", "--tokens", "32"]
    assert cli.main(["compare", str(folder / "checkpoint"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line and line[0] != " "] == [
        "simulate",
        "integer",
        "integer/simulate",
    ]


def test_the_command_reports_one_line(folder, capsys):
    assert cli.main(["compare", str(folder / "float"), "--text", str(folder / "text.txt")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "is a float model" in line
