import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_mobilequant.run import run_dir
from optimum_mobilequant.run.run_dir import STAGES, RunDirectory, fingerprint_of

FINGERPRINT = {"data": "abc", "settings": {"seed": 0, "transforms": ("a", "b")}}


@pytest.fixture
def folder(tmp_path):
    return RunDirectory.open(tmp_path / "deep" / "run", FINGERPRINT)


def names(run):
    return sorted(path.name for path in run.path.iterdir())


def model(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 40, **changes}))


def test_stage_round_trip_keeps_tensors_and_metadata(folder):
    shared = torch.arange(6.0)
    tensors = {
        "float": torch.randn(3, 4),
        "bfloat16": torch.randn(2).to(torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int32),
        "transposed": torch.randn(2, 3).T,
        "view of one": shared[:3],
        "view of the same": shared[1:],
        "empty": torch.empty(0, 4),
        "learned": torch.ones(2, requires_grad=True),
    }
    meta = {"step": 3, "losses": [1.5, 0.25], "name": "ü"}
    folder.save("learn", tensors, meta)
    loaded, loaded_meta = RunDirectory.open(folder.path, FINGERPRINT).load("learn")
    assert loaded_meta == meta
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert names(folder) == ["30_learn.safetensors", "fingerprint.json"]


def test_files_sort_in_the_order_of_the_stages(folder):
    for stage in reversed(STAGES):
        folder.save(stage, {}, {})
    assert [name.split("_", 1)[1].split(".")[0] for name in names(folder)[:-1]] == list(STAGES)


def test_unfinished_and_unknown_stages(folder):
    assert folder.load("pack") is None
    assert folder.load_progress("pack") is None
    with pytest.raises(ValueError, match='did you mean "learn"'):
        folder.save("lern", {}, {})


def test_progress_is_replaced_and_ends_with_its_stage(folder):
    for step in (1, 2):
        folder.save_progress("learn", {"x": torch.tensor([step])}, {"step": step})
    tensors, meta = folder.load_progress("learn")
    assert (tensors["x"].item(), meta) == (2, {"step": 2})
    assert folder.load("learn") is None
    folder.save("learn", {"x": torch.tensor([3])}, {})
    assert folder.load_progress("learn") is None
    assert folder.load("learn")[0]["x"].item() == 3


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.open(None, FINGERPRINT)
    run.save("learn", {"x": torch.ones(1)}, {})
    run.save_progress("learn", {"x": torch.ones(1)}, {})
    assert run.load("learn") is None
    assert run.load_progress("learn") is None
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_with_what_differs(folder):
    folder.save("calibrate", {"x": torch.ones(1)}, {})
    other = {"data": "abd", "settings": {"seed": 1, "transforms": ["a", "b"], "new": True}}
    before = (folder.path / "fingerprint.json").read_bytes()
    with pytest.raises(ValueError, match="another run") as caught:
        RunDirectory.open(folder.path, other)
    message = str(caught.value)
    assert 'data ("abc" there, "abd" now)' in message
    assert "settings.seed (0 there, 1 now)" in message
    assert "settings.new (absent there, true now)" in message
    assert "transforms" not in message
    assert "Use another run_dir, or delete this one" in message
    assert (folder.path / "fingerprint.json").read_bytes() == before
    assert RunDirectory.open(folder.path, FINGERPRINT).load("calibrate") is not None


def test_folders_of_unknown_origin_are_refused(folder, tmp_path):
    (folder.path / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        RunDirectory.open(folder.path, FINGERPRINT)
    folder.save("calibrate", {}, {})
    (folder.path / "fingerprint.json").unlink()
    with pytest.raises(ValueError, match="origin is unknown"):
        RunDirectory.open(folder.path, FINGERPRINT)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="is a file; name a folder"):
        RunDirectory.open(tmp_path / "file", FINGERPRINT)
    with pytest.raises(OSError, match="cannot be created"):
        RunDirectory.open(tmp_path / "file" / "below", FINGERPRINT)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_cannot_be_written_is_refused_at_once(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_dir.os, "replace", refuse)  # works as root too, unlike chmod
    with pytest.raises(OSError, match="check that the folder can be written"):
        RunDirectory.open(folder.path, FINGERPRINT)
    assert names(folder) == ["fingerprint.json"]


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_damaged_file_is_named_with_the_fix(folder, keep):
    folder.save("transform", {"x": torch.ones(100)}, {"a": 1})
    file = folder.path / "20_transform.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"20_transform\.safetensors is damaged .*delete it to redo that stage"):
        folder.load("transform")


def test_file_of_another_stage_is_not_taken(folder):
    folder.save("transform", {}, {})
    os.rename(folder.path / "20_transform.safetensors", folder.path / "30_learn.safetensors")
    with pytest.raises(ValueError, match="not a stage file"):
        folder.load("learn")


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_full_disk_leaves_earlier_stages_and_no_rubbish(folder, monkeypatch, failure):
    folder.save("calibrate", {"x": torch.ones(1)}, {})
    folder.save("learn", {"x": torch.ones(1)}, {})
    before = names(folder)

    def half_written(tensors, target, metadata):
        target.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(run_dir, "save_file", half_written)
    with pytest.raises(OSError, match="the disk is full; free some space") as caught:
        folder.save("learn", {"x": torch.zeros(1)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert names(folder) == before
    assert folder.load("learn")[0]["x"].item() == 1
    assert folder.load("calibrate") is not None


def test_interrupted_write_is_invisible(folder, monkeypatch):
    def interrupted(tensors, target, metadata):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(run_dir, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.save("learn", {}, {})
    assert names(folder) == ["fingerprint.json"]


def test_a_killed_process_leaves_no_rubbish_for_long(folder):
    import subprocess

    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = folder.path / f".30_learn.safetensors.{dead.pid}.tmp"
    own = folder.path / f".30_learn.safetensors.{os.getpid()}.tmp"
    for path in (stale, own):
        path.write_bytes(b"half")
    RunDirectory.open(folder.path, FINGERPRINT)
    assert not stale.exists() and own.exists()


@pytest.fixture(scope="module")
def base():
    return fingerprint_of(model(), "data", {"seed": 0, "run_dir": "here"})


def test_fingerprint_is_stable_across_save_and_load(base, tmp_path):
    model().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    only_places = {"run_dir": "elsewhere", "device": "cuda", "gradient_checkpointing": True}
    assert fingerprint_of(loaded, "data", {"seed": 0} | only_places) == base
    assert json.loads(json.dumps(base)) == base


def test_fingerprint_sees_one_changed_bit_in_any_parameter(base):
    changed = model()
    with torch.no_grad():
        changed.lm_head.weight[17, 3] = torch.nextafter(changed.lm_head.weight[17, 3], torch.tensor(9.0))
    assert fingerprint_of(changed, "data", {"seed": 0})["weights"] != base["weights"]


@pytest.mark.parametrize(
    ("key", "changes", "data", "settings"),
    [
        ("architecture", {"rms_norm_eps": 1e-3}, "data", {"seed": 0}),
        ("data", {}, "other", {"seed": 0}),
        ("settings", {}, "data", {"seed": 1}),
    ],
)
def test_fingerprint_sees_everything_the_result_depends_on(base, key, changes, data, settings):
    other = fingerprint_of(model(**changes), data, settings)
    assert [name for name in base if base[name] != other[name]] == [key]


def test_fingerprint_of_half_precision_and_meta_weights(base):
    half = fingerprint_of(model().to(torch.bfloat16), "data", {"seed": 0})
    assert half["weights"] != base["weights"]
    with pytest.raises(ValueError, match="meta device"):
        fingerprint_of(model().to("meta"), "data", {})
