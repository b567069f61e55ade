"""The scripts and notebooks in examples/ run from beginning to end on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a byte tokenizer, a calibration text and another text."""
    folder = tmp_path_factory.mktemp("examples")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    tiny.build("llama-gqa", vocab_size=len(letters) + 3, max_position_embeddings=512).save_pretrained(folder / "model")
    (folder / "calib.txt").write_text("Once there was a small dog who liked to read. " * 400)
    (folder / "eval.txt").write_text("The dog met a cat and they went to the park. " * 60)
    return folder


def run(script, folder, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quantize_then_evaluate_then_export(folder):
    data = ["--model", "model", "--dataset", "calib.txt", "--text", "eval.txt"]
    out = run("quantize.py", folder, *data, "--preset", "w8a8", "--recipe", "rtn", "--effort", "none", "--out", "out")
    assert "saved in out" in out and (folder / "out" / "config.json").is_file()
    shared = ["--checkpoint", "out", "--text", "eval.txt"]
    out = run("evaluate.py", folder, *shared, "--float", "model", "--seq-len", "32", "--tokens", "64")
    assert "integer/simulate" in out and out.count("\n") >= 8
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is an extra")
    out = run("export.py", folder, *shared, "--context", "32")
    assert "onnx: " in out and "qnn: " in out and "equal codes" in out


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("custom_dataset.py", ["--model", "model", "--out", "chat"], "400 chats"),
        ("mixed_precision.py", ["--model", "model", "--dataset", "calib.txt", "--samples", "8"], "5 bits on average"),
        ("own_architecture.py", [], "quantized as llama"),
    ],
)
def test_a_script_runs(script, arguments, words, folder):
    assert words in run(script, folder, *arguments)


def test_the_notebooks_are_those_of_the_generator(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import make_notebooks

    assert {path.stem for path in NOTEBOOKS} == make_notebooks.NOTEBOOKS.keys()
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert ["".join(cell["source"]) for cell in cells] == make_notebooks.NOTEBOOKS[path.stem], path.stem


def test_every_script_is_run_here_or_by_the_demo():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [
        path.name
        for path in EXAMPLES.glob("*.py")
        if path.name not in ("demo.py", "make_notebooks.py") and f'"{path.name}"' not in tested
    ] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_and_keeps_its_outputs(path, folder, monkeypatch, tmp_path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 4
    assert all(cell["execution_count"] and cell["outputs"] is not None for cell in cells)
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) // 2
    for name in ("model", "calib.txt", "eval.txt"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    source = "\n\n".join("".join(cell["source"]) for cell in cells)
    assert 'MODEL = "demo_model"' in source
    smaller = source.replace('MODEL = "demo_model"', 'MODEL = "model"').replace('effort="light"', 'effort="none"')
    smaller = smaller.replace('dataset="python-stdlib"', 'dataset="calib.txt", samples=8, seq_len=64')
    done = subprocess.run([sys.executable, "-c", smaller], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
