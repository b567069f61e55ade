"""A run that is killed and started again ends where an uninterrupted one ends, bit for bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from optimum_mobilequant import quantize
from optimum_mobilequant.calibrate import stage as calibrate_stage
from optimum_mobilequant.checkpoint import stage as checkpoint_stage
from optimum_mobilequant.config import recipes
from optimum_mobilequant.transform import stage as transform_stage
from optimum_mobilequant.tune import stage as tune_stage
from tests.tiny import build, config, run_python, token_ids

# Files of a distillation that has its text and its rounding.
ROUNDED = ["03_write_more", "04_prefix", "10_calibrate", "20_transform", "30_learn", "35_round"]
# (recipe, where the process dies, files that must be there then)
KILLS = {
    "calibrated": ("mobilequant", "save:calibrate:1", ["10_calibrate"]),
    "transformed": ("mobilequant", "save:transform:1", ["10_calibrate", "20_transform"]),
    "first snapshot": ("mobilequant", "save_progress:learn:1", ["10_calibrate", "20_transform", "30_learn.progress"]),
    "second snapshot": ("mobilequant", "save_progress:learn:2", ["10_calibrate", "20_transform", "30_learn.progress"]),
    "learned": ("mobilequant", "save:learn:1", ["10_calibrate", "20_transform", "30_learn"]),
    "packed": ("mobilequant", "save:pack:1", ["10_calibrate", "20_transform", "30_learn", "40_pack"]),
    "half-written": ("mobilequant", "write::3", ["10_calibrate", "20_transform"]),
    "rounding": (
        "best",
        "save_progress:round:1",
        ["04_prefix", "10_calibrate", "20_transform", "30_learn", "35_round.progress"],
    ),
    "rounded": ("best", "save:round:1", ["04_prefix", "10_calibrate", "20_transform", "30_learn", "35_round"]),
    "smoothed": ("qqq", "save:smooth:1", ["10_calibrate", "15_smooth"]),
    "layers compensated": (
        "qqq",
        "save_progress:round:1",
        ["10_calibrate", "15_smooth", "20_transform", "30_learn", "35_round.progress"],
    ),
    "features": ("qad", "save_progress:features:1", [*ROUNDED, "37_features.progress"]),
    "fine-tuning": ("qad", "save_progress:finetune:1", [*ROUNDED, "37_features", "38_finetune.progress"]),
    "fine-tuned": ("qad", "save:finetune:1", [*ROUNDED, "37_features", "38_finetune"]),
    "layers learned": ("omniquant-edge", "save:learn:1", ["10_calibrate", "20_transform", "30_learn"]),
}
RUN = """
import json, os, signal, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from optimum_mobilequant import quantize
from optimum_mobilequant.config import recipes
from optimum_mobilequant.run import run_dir
from tests.pipeline.test_resume import options_of
from tests.tiny import build, config

recipes.EFFORTS["light"] = replace(recipes.EFFORTS["light"], eval_every=2)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(method, stage, nth):
    original, calls = getattr(run_dir.RunDirectory, method), []
    def call(self, name, *arguments):
        original(self, name, *arguments)
        calls.append(name)
        if name == stage and calls.count(stage) == nth:
            die()
    setattr(run_dir.RunDirectory, method, call)

def dying_while_writing(nth):
    original, calls = run_dir.save_file, []
    def call(tensors, target, **options):
        original(tensors, target, **options)
        calls.append(target)
        if len(calls) == nth:
            target.write_bytes(target.read_bytes()[:100])
            die()
    run_dir.save_file = call

for folder, (recipe, where, _) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        method, stage, nth = where.split(":")
        dying_while_writing(int(nth)) if method == "write" else dying(method, stage, int(nth))
        quantize(build("llama-gqa"), None, config("w4a8", recipe=recipe, **options_of(recipe)), run_dir=folder)
        os._exit(7)
    print(os.waitpid(child, 0)[1], flush=True)  # a forked child must not inherit unwritten lines
"""


def options_of(recipe):
    finetuned = {"rounding_steps": 2, "feature_steps": 4, "finetune_steps": 4, "attention_alignment": 0.1}
    special = {"best": {"steps": 6, "rounding_steps": 4}, "rtn": {}, "qqq": {"steps": None}}
    return {**special, "qad": {"steps": 6, **finetuned}}.get(recipe, {"steps": 6})


@pytest.fixture(scope="module", autouse=True)
def _frequent_snapshots():
    kept = recipes.EFFORTS["light"]
    recipes.EFFORTS["light"] = replace(kept, eval_every=2)
    yield
    recipes.EFFORTS["light"] = kept


def run(recipe="mobilequant", folder=None, *, model=None, **options):
    model = model if model is not None else build("llama-gqa")
    options = config("w4a8", recipe=recipe, **(options_of(recipe) | options))
    model = quantize(model, None, options, run_dir=None if folder is None else str(folder))
    return model, model.config.quantization_config.recorded


def assert_same(result, expected):
    (model, recorded), (other, other_recorded) = result, expected
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    for measured in ("rounding", "finetune", "history", "loss", "best_step", "validation_perplexity", "data_sha256"):
        assert recorded[measured] == other_recorded[measured], measured


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders left behind by killed processes."""
    folders = {name: tmp_path_factory.mktemp("killed") / "run" for name in KILLS}
    result = run_python(RUN, json.dumps({str(folders[name]): kill for name, kill in KILLS.items()}))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["9"] * len(KILLS), "the processes should have died of SIGKILL"
    return folders


@pytest.fixture(scope="module")
def uninterrupted():
    return {recipe: run(recipe) for recipe in {kill[0] for kill in KILLS.values()}}


@pytest.mark.parametrize("name", KILLS)
def test_killed_run_resumes_to_the_same_bits(killed, uninterrupted, monkeypatch, name):
    recipe, _, files = KILLS[name]
    folder = killed[name]
    assert sorted(f.name.removesuffix(".safetensors") for f in folder.glob("[0-9]*")) == files
    if "10_calibrate" in files and "20_transform" in files:
        for stage in (calibrate_stage, transform_stage):
            monkeypatch.setattr(stage, "collect", lambda *a, **k: pytest.fail("calibrated again"))
    if "30_learn" in files and recipe not in ("best", "qad"):
        for name in ("learn_end_to_end", "learn_blockwise"):
            monkeypatch.setattr(tune_stage, name, lambda *a, **k: pytest.fail("learned again"))
    if {"qad": "38_finetune"}.get(recipe, "35_round") in files:
        monkeypatch.setattr(tune_stage, "learn_end_to_end", lambda *a, **k: pytest.fail("learned again"))
    if any("progress" in file for file in files):
        learn, calls = tune_stage.learn_end_to_end, []

        def resumed(*args, resume, **options):
            calls.append(resume)
            assert calls[0] is not None, "the first stage that is left should have gone on, not begun anew"
            return learn(*args, resume=resume, **options)

        monkeypatch.setattr(tune_stage, "learn_end_to_end", resumed)
    assert_same(run(recipe, folder), uninterrupted[recipe])


def test_finished_run_is_not_computed_again(tmp_path, uninterrupted, monkeypatch):
    assert_same(run(folder=tmp_path), uninterrupted["mobilequant"])
    monkeypatch.setattr(calibrate_stage, "collect", lambda *a, **k: pytest.fail("computed again"))
    for stage, name in ((transform_stage, "collect"), (tune_stage, "learn_end_to_end"), (checkpoint_stage, "pack")):
        monkeypatch.setattr(stage, name, lambda *a, **k: pytest.fail("computed again"))
    assert_same(run(folder=tmp_path), uninterrupted["mobilequant"])
    # Neither the folder's place nor what only says where and with how much memory to work makes another run.
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    elsewhere = run(folder=moved, device="cpu", gradient_checkpointing=True)
    assert_same(elsewhere, uninterrupted["mobilequant"])


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "settings.seed \\(0 there, 1 now\\)"),
        ({"steps": 8}, "settings.steps \\(6 there, 8 now\\)"),
        ({"dataset": token_ids(seed=3)}, "data"),
        ({"model": build("llama-gqa", seed=9)}, "weights"),
        ({"recipe": "omniquant-edge"}, "settings.recipe"),
    ],
    ids=["seed", "steps", "data", "weights", "recipe"],
)
def test_folder_of_another_run_is_refused(tmp_path, changes, difference, monkeypatch):
    monkeypatch.setattr(tune_stage, "learn_end_to_end", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path / "run")
    files = {f: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=f"holds another run, which differs in: .*{difference}"):
        run(folder=tmp_path / "run", **changes)
    assert {f: f.read_bytes() for f in (tmp_path / "run").iterdir()} == files


def test_damaged_stage_file_is_named(tmp_path):
    run(folder=tmp_path)
    victim = tmp_path / "20_transform.safetensors"
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(ValueError, match="20_transform.safetensors is damaged .*; delete it to redo that stage"):
        run(folder=tmp_path)


@pytest.mark.parametrize("recipe", ["rtn", "mobilequant", "omniquant-edge"])
def test_two_runs_are_equal(recipe):
    assert_same(run(recipe), run(recipe))


def test_another_seed_gives_another_result():
    a, b = (run(seed=seed)[0].state_dict() for seed in (0, 1))
    assert any(not torch.equal(a[k], b[k]) for k in a)
