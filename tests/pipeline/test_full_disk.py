"""A disk that is full in the middle of a run: one clear error, nothing lost, and the same call goes on."""

import errno
import os
import shutil
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import cli
from optimum_mobilequant.run import run_dir
from tests import tiny
from tests.pipeline.test_resume import run


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``mobilequant quantize`` of a small Llama with a byte tokenizer, without its folders."""
    folder = tmp_path_factory.mktemp("full")
    vocabulary = {token: index for index, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "model")
    tiny.build("llama-gqa", vocab_size=len(vocabulary)).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    words = ["quantize", str(folder / "model"), "--preset", "w8a8", "--dataset", str(folder / "text.txt")]
    for setting in ("samples=4", "seq_len=32", "batch_size=4"):
        words += ["--set", setting]
    return words


@pytest.fixture
def disk(tmp_path):
    """A file system of a given size, which can grow."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may make a file system; the test below makes do without")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_disk_that_is_really_full_keeps_earlier_stages_and_the_same_call_goes_on(disk, tmp_path):
    expected, _ = run(folder=tmp_path / "whole")
    sizes = {path.name: -(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "whole").iterdir()}
    room = sum(size for name, size in sizes.items() if name < "25" or name == "fingerprint.json")
    folder = disk(f"size={room + 8192}")
    with pytest.raises(
        OSError, match="the disk is full; free some space.*Finished stages are kept: run again"
    ) as caught:
        run(folder=folder)
    assert caught.value.errno == errno.ENOSPC
    there = sorted(path.name for path in folder.iterdir())
    assert {"10_calibrate.safetensors", "20_transform.safetensors", "fingerprint.json"} <= set(there)
    assert "40_pack.safetensors" not in there and not [name for name in there if name.endswith(".tmp")]
    stages = {name: (folder / name).read_bytes() for name in there if name < "25"}
    subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)
    model, _ = run(folder=folder)
    assert all((folder / name).read_bytes() == content for name, content in stages.items())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("stage", ["calibrate", "learn", "pack"])
def test_a_full_disk_in_any_stage_is_one_line_of_the_command(command, tmp_path, monkeypatch, capsys, stage):
    out, folder, full = tmp_path / "out", tmp_path / "run", [True]
    save = run_dir.save_file

    def write(tensors, target, metadata):
        if full[0] and metadata["stage"] == stage:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, target, metadata=metadata)

    monkeypatch.setattr(run_dir, "save_file", write)
    words = [*command, "--out", str(out), "--run-dir", str(folder), "--effort", "light", "--set", "steps=2"]
    assert cli.main(words) == cli.BAD_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "the disk is full; free some space" in line and "Finished stages are kept" in line
    assert not out.exists() and not list(folder.glob(".*"))
    kept = {path.name for path in folder.glob("*.safetensors")}
    full[0] = False
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert kept < {path.name for path in folder.glob("*.safetensors")} and (out / "config.json").is_file()
    for word in ("perplexity, float", "before learning", "quantized", "size", "minutes", "peak memory", "saved"):
        assert word in printed.out, word
    assert str(out) in printed.out


def test_saving_to_a_full_disk_names_the_way_on(disk, command, tmp_path, capsys):
    folder = disk("size=32k")
    words = [*command, "--recipe", "rtn", "--effort", "none"]
    assert cli.main([*words, "--out", str(folder / "out"), "--run-dir", str(tmp_path / "run")]) == cli.BAD_INPUT
    assert "free some space and run the same command again" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_beside_the_result_goes(command, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".out.{dead.pid}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    other = tmp_path / f".out.{os.getppid()}.partial"
    other.mkdir()
    assert cli.main([*command, "--recipe", "rtn", "--effort", "none", "--out", str(tmp_path / "out")]) == 0
    assert not left.exists() and other.exists()
