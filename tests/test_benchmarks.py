"""The benchmark scripts run and keep their files; their numbers are not tested."""

import importlib.util
import json
import runpy
import shutil
import sys
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``models/small``, a Llama with a byte tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("benchmarks")
    vocabulary = {token: index for index, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = folder / "models" / "small"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    tiny.build("llama-gqa", vocab_size=len(vocabulary), num_hidden_layers=1).save_pretrained(path)
    (folder / "calibration.txt").write_text("Once there was a small dog who liked to read. " * 100, encoding="utf-8")
    (folder / "evaluation.txt").write_text("The dog met a cat and they went to the park. " * 50, encoding="utf-8")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a script in this process, which spares the start of an interpreter; returns what it exits with."""

    def call(script, *options):
        path = tiny.ROOT / "benchmarks" / script
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT))
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code

    return call


def quality(run, *options):
    small = ["--models", "models", "--text", "small=calibration.txt,evaluation.txt,1000", "--quick", "--seq-len", 32]
    return run("quality.py", "--out", "quality.json", *small, *options)


def test_quality_measures_what_is_asked_for_and_no_row_twice(run, folder, capsys):
    assert quality(run, "--only", "small/injected/w?a8/rtn") is None
    first = json.loads((folder / "quality.json").read_text())
    names = [(row["variant"], row["preset"], row["case"]) for row in first["rows"]]
    assert names == [("injected", "float32", "float"), ("injected", "w8a8", "rtn"), ("injected", "w4a8", "rtn")]
    assert all(row["perplexity"] > 1 and row["gap"] > -0.5 for row in first["rows"])
    assert first["runs"][0]["versions"]["torch"]
    assert "| small | injected | w4a8 | rtn |" in capsys.readouterr().out
    assert str(folder) not in json.dumps(first)  # a result may be published: it names files, not places

    assert "--append" in quality(run, "--only", "small/injected/w8a8/rtn")
    patterns = ["injected/w8a8/[qs]*", "injected/w8a8/r1r2", "plain/w4a8/block-wise"]
    wanted = [word for pattern in patterns for word in ("--only", f"small/{pattern}")]
    assert quality(run, "--append", *wanted) is None
    second = json.loads((folder / "quality.json").read_text())
    assert second["rows"][:3] == first["rows"]
    added = [(row["variant"], row["preset"], row["case"]) for row in second["rows"][3:]]
    keys = [(v, case["preset"], case["name"]) for v in ("plain", "injected") for case in second["cases"]]
    cases = [key for key in keys if any(fnmatch("/".join(key), pattern) for pattern in patterns)]
    assert len(cases) > 3 and sorted(added) == sorted([*cases, ("plain", "float32", "float")])
    assert "was measured with" in quality(run, "--append", "--seed", 1)
    assert "another text" in quality(run, "--append", "--text", "small=evaluation.txt,calibration.txt,9", *wanted)


def test_ladder_measures_seeds_once_and_says_what_a_recipe_adds(run, folder, capsys):
    small = ["--models", "models", "--text", "small=calibration.txt,evaluation.txt,1000", "--quick", "--seq-len", 32]
    small += ["--out", "ladder.json", "--only", "small", "--presets", "w4a8", "--recipes", "rtn", "smoothquant"]
    assert run("ladder.py", *small) is None
    assert run("ladder.py", *small, "--append", "--seeds", 0, 1) is None
    rows = json.loads((folder / "ladder.json").read_text())["rows"]
    assert [(row["recipe"], row["seed"]) for row in rows] == [
        ("float", 0), ("rtn", 0), ("smoothquant", 0), ("rtn", 1), ("smoothquant", 1)
    ]  # fmt: skip
    assert rows[2]["gain"] == pytest.approx(rows[1]["gap"] - rows[2]["gap"]) and "smooth_alpha=0.5" in rows[2]["added"]
    assert all(row["peak_memory_bytes"] > 2**20 and row["minutes"] > 0 for row in rows[1:])
    assert "| small | plain | w4a8 | rtn | 2 |" in capsys.readouterr().out


def test_allocation_measures_choices_and_controls(run, folder, capsys):
    sizes = ["--model", "models/small", "--budgets", 6, "--seq-len", 32, "--samples", 8, "--max-chars", 1000]
    sizes += ["--dataset", "calibration.txt", "--text", "evaluation.txt"]
    assert run("allocation.py", "--out", "allocation.json", *sizes) is None
    rows = json.loads((folder / "allocation.json").read_text())["rows"]
    assert {row["how"] for row in rows} == {"uniform", "random", "hessian", "kl", "jaccard"}
    assert all(row["mean_bits"] <= row["budget"] and row["perplexity"] > 1 and row["divergence"] > 0 for row in rows)
    assert len({tuple(row["chosen"].values()) for row in rows if row["how"] == "random"}) > 1
    assert "| random | 4, 8 | 6 | 2 |" in capsys.readouterr().out


def test_cost_prints_ratios(run, folder, capsys):
    sizes = ["--batch", 2, "--length", 32, "--rounds", 2, "--warmup", 1]
    assert run("cost.py", "--model", "models/small", "--out", "cost.json", *sizes) is None
    found = json.loads((folder / "cost.json").read_text())
    assert found["time"]["ratio"] > 0 and found["memory"]["quantize bytes"] > 0
    assert "ratio" in capsys.readouterr().out


def test_fidelity_measures_each_checkpoint_once_and_names_what_is_absent(run, folder, capsys, monkeypatch):
    import optimum_mobilequant.exporters.htp as htp

    def missing():
        raise ImportError("no emulator: pip install it")

    monkeypatch.setattr(htp, "require_emulator", missing)
    sizes = ["--seq-len", 16, "--tokens", 32, "--quick", "--recipe", "rtn", "--models", "models"]
    sizes += ["--text", "small=calibration.txt,evaluation.txt,1000", "--out", "fidelity.json"]
    assert run("fidelity.py", *sizes, "--only", "small/w8a8") is None
    first = json.loads((folder / "fidelity.json").read_text())
    (row,) = first["rows"]
    assert (row["model"], row["preset"], row["run"]) == ("small", "w8a8", 0)
    assert {"float", "simulate", "integer"} <= row["runners"].keys() and "htp" not in row["runners"]
    assert row["absent"]["htp"] == "no emulator: pip install it"
    assert 0 < row["pairs"]["integer/simulate"]["argmax"] <= 1
    assert str(folder) not in json.dumps(first)
    assert "integer/simulate" in capsys.readouterr().out

    assert "--append" in run("fidelity.py", *sizes)
    assert run("fidelity.py", *sizes, "--append", "--only", "small/w8a8", "--only", "small/w4a8") is None
    second = json.loads((folder / "fidelity.json").read_text())
    assert second["rows"][0] == row and [r["preset"] for r in second["rows"]] == ["w8a8", "w4a8"]
    assert "was measured with" in run("fidelity.py", *sizes, "--append", "--seed", 1)


def test_tuning_speed_runs_checkouts_by_turns(run, folder, capsys):
    sizes = ["--batch", 2, "--length", 16, "--samples", 4, "--steps", 3]
    baseline = ["--baseline", f"same={tiny.ROOT}"]
    assert run("tuning_speed.py", "--model", "models/small", "--out", "tuning.json", *sizes, *baseline) is None
    found = json.loads((folder / "tuning.json").read_text())["contenders"]
    assert found.keys() == {"this", "same"}
    for row in found.values():
        assert row["tokens_per_wall_s"] > 0 and row["tokens_per_cpu_s"] > 0 and row["peak_bytes"] > 0
    assert found["this"]["history"] == found["same"]["history"], "the same code should learn the same"
    assert found["same"]["wall_speed_of_this"] > 0 and found["this"]["wall_speed_of_this"] == 1
    assert "no package" in run("tuning_speed.py", "--model", "models/small", "--baseline", f"none={folder}")


def test_finetune_compares_settings_behind_one_state(run, folder, capsys):
    small = ["--models", "models", "--text", "small=calibration.txt,evaluation.txt,1000", "--quick", "--seq-len", 32]
    wanted = ["--only", "small", "--runs", "runs", "--other-chars", 500]
    cases = ["--cases", "qad", "scales", "all from pieces"]
    assert run("finetune.py", "--out", "finetune.json", *small, *wanted, *cases) is None
    rows = {row["case"]: row for row in json.loads((folder / "finetune.json").read_text())["rows"]}
    assert list(rows) == ["best", "qad", "all from pieces", "scales"]
    assert rows["best"]["changed"] is None and rows["scales"]["changed"] == 0
    starts = {row["history"][0][1] for name, row in rows.items() if name != "best"}
    assert len(starts) == 1, "all start from one state"
    assert all(row["divergence"] > 0 and row["gap_other"] is not None for row in rows.values())
    first = folder / "runs" / "small" / "w4a8" / "0"
    stages = {file.name: load_file(file) for file in (first / "best").glob("3[0-5]_*.safetensors")}
    assert len(stages) == 2
    for stage, tensors in stages.items():
        found = load_file(first / "qad" / stage)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert "| small | w4a8 | scales | 0 |" in capsys.readouterr().out


def test_speed_reports_ratios_of_both_presets(run, folder, capsys):
    sizes = ["--shape", "small", "--layers", 1, "--prompt", 8, "--tokens", 4, "--repeat", 1, "--threads", 1, "--json"]
    assert run("speed.py", *sizes, "--out", "speed.json") is None
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "speed.json").read_text())
    assert found.keys() == {"w8a8", "w4a8", "about"}
    for preset, peer in (("w8a8", "vs_quanto_int8"), ("w4a8", "vs_quanto_int4")):
        for phase in ("prefill", "decode"):
            assert found[preset][phase].keys() == {"tokens_per_s", "vs_bf16", peer}
            assert all(value > 0 for value in found[preset][phase].values())
    assert found["w4a8"]["resident_weight_ratio"] < found["w8a8"]["resident_weight_ratio"] < 1
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(ImportError, match="pip install torchao"):
            run("speed.py", *sizes, "--against", "torchao")


def test_static_dynamic_climbs_the_ladder(run, folder, capsys):
    small = ["--models", "models", "--text", "small=calibration.txt,evaluation.txt,1000", "--quick", "--seq-len", 32]
    wanted = ["--only", "small/plain/w4a8/dynamic*", "--only", "small/plain/w4a8/s*"]
    if importlib.util.find_spec("torchao") is None:
        assert "pip install torchao" in run("static_dynamic.py", "--out", "sd.json", *small, *wanted)
        wanted[1] = "small/plain/w4a8/dynamic"
    assert run("static_dynamic.py", "--out", "sd.json", *small, *wanted) is None
    rows = {row["case"]: row for row in json.loads((folder / "sd.json").read_text())["rows"]}
    assert {"float", "dynamic", "static min-max", "smoothquant-edge", "searched ranges"} <= rows.keys()
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert rows["dynamic"]["perplexity"] != rows["static min-max"]["perplexity"]
    assert "| learned ranges | — | — | — | — |" in capsys.readouterr().out


def test_memory_measures_a_run(run, folder, capsys):
    sizes = ["--layers", 1, "--hidden", 64, "--vocabulary", 128, "--samples", 8, "--steps", 1, "--threads", 1]
    assert run("memory.py", "--out", "memory.json", *sizes, "--only", "batch_size=1") is None  # a process for each row
    (row,) = json.loads((folder / "memory.json").read_text())["rows"]
    assert 0 < row["estimate"] < row["peak"] and row["ratio"] == 1
    assert "| batch_size=1 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ladder.svg", "speed.svg"])
def test_pictures_are_what_the_results_give(name, monkeypatch):
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
    pictures = importlib.import_module("pictures")
    kept = (pictures.PICTURES / name).read_bytes()
    assert pictures.FILES[name]().encode() == kept and len(kept) < 300_000


def test_tables_of_the_pages_are_what_the_results_give(monkeypatch):
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
    results, pages = tiny.ROOT / "benchmarks" / "results", tiny.ROOT / "docs"
    rows = json.loads((results / "static_dynamic.json").read_text(encoding="utf-8"))["rows"]
    table = importlib.import_module("static_dynamic").ladder(rows)
    assert table in (pages / "static_dynamic.md").read_text(encoding="utf-8")
    rows = json.loads((results / "ladder.json").read_text(encoding="utf-8"))["rows"]
    ladder, text = importlib.import_module("ladder"), (pages / "results.md").read_text(encoding="utf-8")
    assert ladder.page(rows) in text
    assert ladder.page(rows, ("rtn", "adpq", "gptq", "qqq"), ("w4a8",)) in text
    assert ladder.page(rows, ("rtn", "best"), ("w8a8", "w4a8"), "injected") in text
    distilled = (tiny.ROOT / "docs" / "finetune.md").read_text()
    assert ladder.page(rows, ("rtn", "best", "qad"), ("w4a8",)) in distilled
    rows = json.loads((results / "ladder_massive.json").read_text(encoding="utf-8"))["rows"]
    assert ladder.page(rows, ("rtn", "best")) in (pages / "prefix.md").read_text(encoding="utf-8")
    rows = json.loads((results / "finetune.json").read_text(encoding="utf-8"))["rows"]
    assert importlib.import_module("finetune").page(rows) in distilled
    formats = (pages / "formats.md").read_text(encoding="utf-8")
    rows = json.loads((results / "formats_models.json").read_text(encoding="utf-8"))["rows"]
    gaps = {(row["model"], row["case"]): row["gap"] for row in rows}
    for model in {model for model, _ in gaps}:
        cases = ("rtn", "adpq", "stored as adpq, no outliers", "stored as adpq")
        assert f"| {model} | " + " | ".join(f"{gaps[model, case]:.2%}".replace("%", " %") for case in cases) in formats
    rows = json.loads((results / "peers.json").read_text(encoding="utf-8"))["rows"]
    assert importlib.import_module("peers").overview(rows) in (pages / "peers.md").read_text(encoding="utf-8")
    page = importlib.import_module("allocation").page
    for name in ("allocation.json", "allocation_gptq.json"):
        rows = json.loads((results / name).read_text(encoding="utf-8"))["rows"]
        assert page(rows) in (pages / "bits.md").read_text(encoding="utf-8")
    memory = importlib.import_module("memory")
    rows = json.loads((results / "memory.json").read_text(encoding="utf-8"))["rows"]
    table = importlib.import_module("table").markdown(memory.HEADER, map(memory.cells, rows))
    assert table in (pages / "memory.md").read_text(encoding="utf-8")


def test_startup_compares_fresh_interpreters_and_fails_beyond_a_limit(run, folder, capsys):
    code = run("startup.py", "--out", "startup.json", "--repeat", 1)
    rows = {row["case"]: row for row in json.loads((folder / "startup.json").read_text())["rows"]}
    assert rows["python"]["beyond"] is None and rows["import transformers"]["beyond"] > 0
    exceeded = [name for name, row in rows.items() if row["limit"] is not None and row["beyond"] > row["limit"]]
    assert code == bool(exceeded)
    assert "| mobilequant --help |" in capsys.readouterr().out
    assert str(folder) not in json.dumps(rows)


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no Chromium"
)
def test_report_page_times_a_page_and_fails_beyond_a_limit(run, folder, capsys):
    slow = "<script>const end = performance.now() + 1100; while (performance.now() < end);</script>"
    for name, script in (("quick", ""), ("slow", slow)):
        (folder / f"{name}.html").write_text(f"<html><body>{script}<p>text</p></body></html>", encoding="utf-8")
    options = ("--out", "page.json", "--repeat", 1)
    assert run("report_page.py", "slow.html", *options) == 1
    (row,) = json.loads((folder / "page.json").read_text())["pages"]
    assert row["page"] == "slow.html" and row["milliseconds"][0] > 1100 and row["bytes"] < 1000
    assert "| slow.html |" in capsys.readouterr().out
    code = run("report_page.py", "quick.html", *options)
    assert bool(code) == (json.loads((folder / "page.json").read_text())["pages"][0]["milliseconds"][0] > 1000)
