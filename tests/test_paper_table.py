"""The page with the paper's tables: it shows what is stored, and every command on it runs.

The commands run as they stand, with these replacements: small random models of the same architectures for the paper's,
the CPU for the GPU, sizes of a test for those of the paper. Data sets of the Hub are replaced by rows of their form.
"""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import cli
from tests import tiny


@pytest.fixture(scope="module")
def script():
    path = tiny.ROOT / "benchmarks" / "paper_table.py"
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("paper_table", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["paper_table"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def big(script):
    return [subject for subject in script.SUBJECTS.values() if subject.tasks]


STAND_INS = {"TinyLlama-1.1B": "llama-gqa", "StableLM-2-1.6B": "stablelm", "Gemma-2B": "gemma"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The stand-ins with a byte tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("paper")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    for name, variant in STAND_INS.items():
        fast.save_pretrained(folder / name)
        sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 2048, "num_hidden_layers": 1}
        tiny.build(variant, **sizes).save_pretrained(folder / name)
    (folder / "calib.txt").write_text("Once there was a small dog who liked to read. " * 100, encoding="utf-8")
    return folder


SIZES = {"samples": "8", "seq_len": "32", "batch_size": "4", "steps": "2", "rounding_steps": "2"}


def small(line, subject, stand_in):
    """A command of the page on a stand-in."""
    assert f" {subject.model} " in line
    line = line.replace(f" {subject.model} ", f" {stand_in} ").replace("--device cuda", "--device cpu")
    assert "--dataset mit-han-lab/pile-val-backup --set dataset_split=validation" in line
    line = line.replace("--dataset mit-han-lab/pile-val-backup --set dataset_split=validation", "--dataset calib.txt")
    for name, value in SIZES.items():
        line = re.sub(rf"--set {name}=\d+", f"--set {name}={value}", line)
    return line


def run(line):
    words = shlex.split(line)
    assert words[0] == "mobilequant"
    return cli.main(words[1:])


def forms(script):
    """Every distinct set of options, with the models by turns."""
    options = dict.fromkeys(row.options for rows in script.TABLES.values() for row in rows if row.options)
    rows = {row.options: row for rows in script.TABLES.values() for row in rows}
    subjects = big(script)
    return [(subjects[index % len(subjects)], rows[chosen]) for index, chosen in enumerate(options)]


def test_every_form_of_quantize_runs(script, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shown = (tiny.ROOT / "benchmarks" / "paper_table.md").read_text(encoding="utf-8")
    wanted = forms(script)
    assert len(wanted) >= 10 and {subject.name for subject, _ in wanted} == set(STAND_INS)
    for subject, row in wanted:
        first = script.commands(big(script)[0], row, "wikitext", device="cuda", out=Path("runs/paper"))[0]
        assert first in shown
        line = script.commands(subject, row, "wikitext", device="cuda", out=Path("runs/paper"))[0]
        assert run(small(line, subject, subject.name)) == 0, line
        saved = Path(script.folder_of(subject, row, Path("runs/paper")))
        config = json.loads((saved / "config.json").read_text())["quantization_config"]
        assert config["preset"] == shlex.split(row.options)[1]
        if "learn_ranges" in row.options:
            assert config["learn_ranges"] is True


ROWS = {
    "EleutherAI/wikitext_document_level": {"page": "The dog met a cat . They went to the park ."},
    "allenai/ai2_arc": {
        "id": "a", "question": "Who ran?", "answerKey": "B", "choices": {"text": ["dog", "cat"], "label": ["A", "B"]},
    },
    "Rowan/hellaswag": {
        "ind": 0, "activity_label": "Run", "ctx_a": "The dog", "ctx_b": "ran", "ctx": "The dog ran", "label": "1",
        "endings": ["to a park.", "seventeen.", "blue.", "and."], "source_id": "a", "split": "val", "split_type": "in",
    },
    "cais/mmlu": {"question": "2 + 2?", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 3},
}  # fmt: skip


@pytest.fixture
def small_data(monkeypatch):
    """lm-eval's data sets, one row each."""
    datasets = pytest.importorskip("datasets", reason='tasks are an extra: pip install "optimum-mobilequant[eval]"')
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append(path)
        part = datasets.Dataset.from_list([ROWS[path]] * 2)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), part))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("tasks", ["wikitext", "arc_challenge,hellaswag,mmlu"])
def test_both_forms_of_measuring_run(script, folder, small_data, tasks, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason='tasks are an extra: pip install "optimum-mobilequant[eval]"')
    monkeypatch.chdir(folder)
    subject = script.SUBJECTS["TinyLlama-1.1B"]
    row = script.DOWNSTREAM[1]
    first, last = script.commands(subject, row, tasks, device="cuda", out=Path("runs/paper"))
    if not Path(script.folder_of(subject, row, Path("runs/paper"))).exists():
        assert run(small(first, subject, subject.name)) == 0
    assert tasks in (script.TASKS, "wikitext")
    assert last in (tiny.ROOT / "benchmarks" / "paper_table.md").read_text(encoding="utf-8")
    assert run(last.replace("--device cuda", "--device cpu")) == 0
    scores = script.scores_of(Path(shlex.split(last)[-1]), tasks)
    assert list(scores) == tasks.split(",") and all(value >= 0 for value in scores.values())
    assert len(set(small_data)) == len(scores)
    if tasks == "wikitext":
        assert scores["wikitext"] > 1


def test_the_page_shows_what_is_stored_and_nothing_else(script):
    stored = json.loads(script.RESULTS.read_text(encoding="utf-8")) if script.RESULTS.is_file() else {}
    text = script.PAGE.read_text(encoding="utf-8")
    assert text == script.page(stored)
    known = {
        script.key_of(subject, row, tasks)
        for subject in script.SUBJECTS.values() for rows in script.TABLES.values() for row in rows
        for tasks in ("wikitext", script.TASKS)
    }  # fmt: skip
    assert stored.keys() <= known
    assert not any(
        key.startswith(name) for key in stored for name in STAND_INS if "cuda" not in json.dumps(stored[key])
    )
    key = script.key_of(script.SUBJECTS["TinyLlama-1.1B"], script.PERPLEXITY[1], "wikitext")
    assert "| 177 | 12.3 | 583 |" in script.page({key: {"scores": {"wikitext": 12.345}}})
