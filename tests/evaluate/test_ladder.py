"""The ladder: its rows agree with single runs, it goes on where it stopped, and bad input stops it at once."""

import json
import logging
from dataclasses import asdict

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import perplexity, quantize
from optimum_mobilequant.evaluate import ladder as module
from optimum_mobilequant.evaluate.ladder import Rung, added, ladder, table
from optimum_mobilequant.run.resources import peak_memory, reset_peak_memory
from tests.tiny import build, config

OPTIONS = {"effort": "none", "samples": 8, "seq_len": 16, "batch_size": 4}
TEXT = "the dog met a cat and went to the park. " * 10


def characters():
    """One token for each printable character."""
    core = Tokenizer(models.WordLevel({"<unk>": 0} | {chr(i): i - 31 for i in range(32, 127)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def climb(**more):
    loads = []

    def load():
        loads.append(1)
        return build("llama")

    dataset = config().dataset
    options = {"recipes": ["rtn", "smoothquant-edge"], "presets": ["w4a8"], "options": OPTIONS, "seq_len": 16}
    return ladder(load, characters(), dataset, TEXT, **(options | {"progress": False} | more)), len(loads)


def test_rows_are_those_of_single_runs_with_what_each_recipe_adds():
    seen = []
    rungs, loads = climb(on_rung=seen.append)
    assert seen == rungs and loads == 3
    assert [(r.recipe, r.preset) for r in rungs] == [
        ("float", "float32"),
        ("rtn", "w4a8"),
        ("smoothquant-edge", "w4a8"),
    ]
    model = quantize(build("llama"), None, config("w4a8", recipe="smoothquant-edge", effort="none", steps=None))
    expected = perplexity(model, characters(), TEXT, seq_len=16, progress=False).perplexity
    base, top = rungs[1:]
    assert top.perplexity == expected
    assert top.gap == pytest.approx(expected / rungs[0].perplexity - 1)
    assert top.gain == pytest.approx(base.gap - top.gap) and base.gain is None
    assert {"smooth_alpha=0.5"} < set(top.added) and base.added == ()
    assert not any(part.startswith(("recipe=", "effort=", "samples=")) for part in top.added)
    assert base.mean_bits == 4 and base.extras == {} and base.minutes > 0 and base.peak_memory_bytes > 2**20
    assert base.validation.keys() == {"float", "start", "quantized"}
    shown = table(rungs)
    assert shown.count("\n") == 4 and "| w4a8 | smoothquant-edge |" in shown and "float32" in shown


def test_a_finished_row_is_kept_and_the_rest_goes_on(tmp_path, monkeypatch):
    def stop(rung):
        if rung.recipe == "rtn":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        climb(run_dir=tmp_path / "run", on_rung=stop)
    rungs, loads = climb(run_dir=tmp_path / "run")
    assert loads == 1  # only the last
    plain, _ = climb()
    for kept, fresh in zip(rungs, plain, strict=True):
        assert (kept.perplexity, kept.gap, kept.gain, kept.added) == (
            fresh.perplexity, fresh.gap, fresh.gain, fresh.added
        )  # fmt: skip
    stored = json.loads((tmp_path / "run" / "ladder.json").read_text())
    assert [row["recipe"] for row in stored["rungs"]] == ["float", "rtn", "smoothquant-edge"]
    assert str(tmp_path) not in json.dumps(stored)
    with pytest.raises(ValueError, match="holds another ladder \\(seq_len\\)"):
        climb(run_dir=tmp_path / "run", seq_len=8)


def test_a_refused_run_is_a_row_and_the_ladder_goes_on(monkeypatch):
    import optimum_mobilequant.pipeline as pipeline

    real = pipeline.quantize

    def worse(model, tokenizer, config, *, run_dir=None):
        if config.recipe == "rtn":
            raise RuntimeError("tuning made the model worse")
        return real(model, tokenizer, config, run_dir=run_dir)

    monkeypatch.setattr(pipeline, "quantize", worse)
    rungs, _ = climb()
    assert rungs[1].error == "tuning made the model worse" and rungs[1].perplexity is None
    assert rungs[2].error is None and rungs[2].gain is None
    assert "refused" in table(rungs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": ["rtn", "smoothqant"]}, 'did you mean "smoothquant"'),
        ({"presets": ["w8a88"]}, 'did you mean "w8a8"'),
        ({"recipes": []}, "at least one recipe"),
        ({"recipes": ["rtn", "rtn"]}, "named twice"),
        ({"options": {**OPTIONS, "steps": 5}}, "would have no effect"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr(module, "perplexity", lambda *a, **k: pytest.fail("something was measured"))
    with pytest.raises(ValueError, match=message):
        climb(**options)


def test_the_same_text_twice_is_warned_about(tmp_path, caplog, monkeypatch):
    from transformers.utils import logging as library

    library.enable_propagation()
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 8, encoding="utf-8")
    for text, warned in ((TEXT * 8, True), (TEXT, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            options = {"recipes": ["rtn"], "presets": ["w8a8"], "options": OPTIONS, "seq_len": 16, "progress": False}
            ladder(lambda: build("llama"), characters(), str(file), text, **options)
        assert ("is the evaluation text" in caplog.text) is warned


def test_added_lists_settings_that_differ_and_no_effort():
    below, here = config(recipe="rtn").resolve(), config(recipe="mobilequant", samples=9).resolve()
    found = added(below, here)
    assert "tuning=end-to-end" in found and "clip_init=mse" in found
    assert not any(part.startswith("samples") for part in found)
    assert added(None, here) == [] and added(here, here) == []


def test_peak_memory_starts_anew():
    import torch

    held = torch.ones(200 * 2**20 // 4)
    before = peak_memory()
    del held
    if not reset_peak_memory():
        pytest.skip("this system cannot reset the peak")
    assert peak_memory() < before - 100 * 2**20


def test_rows_are_plain_json():
    rung = Rung("rtn", "w8a8", 5.0, 0.1, None, ("a=1",), {"float": 1.0}, 0.1, 5, 8.0, {"prefix slots": 2})
    assert json.loads(json.dumps(asdict(rung)))["extras"] == {"prefix slots": 2}
    assert "2 prefix slots" in table([rung])
