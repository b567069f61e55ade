"""Tasks through lm-eval: equal to a computation by hand, recorded in the checkpoint, refused before any loading."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval", reason='tasks are an extra: pip install "optimum-mobilequant[eval]"')
pytest.importorskip("datasets", reason='tasks are an extra: pip install "optimum-mobilequant[eval]"')

from optimum_mobilequant import cli, quantize  # noqa: E402
from optimum_mobilequant.checkpoint.record import record_evaluation  # noqa: E402
from optimum_mobilequant.evaluate.tasks import evaluate_tasks, load_tasks  # noqa: E402
from tests import tiny  # noqa: E402

LETTERS = " abcdefghijklmnopqrstuvwxyz"
DOCUMENTS = [{"question": "the cat", "choices": [" sat", " qqq", " zz"], "answer": i % 3} for i in range(3)] + [
    {"question": "a dog", "choices": [" ran", " xxxx", " b"], "answer": i % 3} for i in range(3)
]
YAML = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model, its checkpoint, and a task."""
    folder = tmp_path_factory.mktemp("tasks")
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"<s>": 27, "</s>": 28}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>", bos_token="<s>", eos_token="</s>")
    model = tiny.build("llama-gqa")
    model.save_pretrained(folder / "float")
    fast.save_pretrained(folder / "float")
    quantize(model, None, tiny.config()).save_pretrained(folder / "checkpoint")
    fast.save_pretrained(folder / "checkpoint")
    (folder / "tasks").mkdir()
    data = folder / "tasks" / "letters.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in DOCUMENTS) + "\n")
    (folder / "tasks" / "letters.yaml").write_text(YAML.format(file=data))
    return folder


def by_hand(model, tokenizer):
    """Share of documents whose answer has the highest log-likelihood."""
    right = 0
    for row in DOCUMENTS:
        totals = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            count = len(tokenizer(choice)["input_ids"])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            totals.append(float(logs[-count:].sum()))
        right += totals.index(max(totals)) == row["answer"]
    return right / len(DOCUMENTS)


@pytest.mark.parametrize("which", ["float", "checkpoint"])
def test_accuracy_is_that_of_a_computation_by_hand(folder, which):
    model, tokenizer = cli.common.load(str(folder / which), dtype="auto")
    found = evaluate_tasks(model, tokenizer, ["letters"], folder=folder / "tasks", bos=False)
    assert found.scores == {"letters": {"acc": pytest.approx(by_hand(model, tokenizer))}}
    assert found.scores["letters"]["acc"] == pytest.approx(1 / 3)  # each answer is right once for each question
    assert found.versions == {"letters": 2.0} and found.bos is False and found.limit is None
    assert found.packages["lm-eval"] and found.shots == {"letters": 0}
    assert found.asked == ("letters",) and found.data == {"letters": {"split": "test"}}  # no path of this machine
    assert found.errors["letters"]["acc"] == pytest.approx((2 / 9 / 5) ** 0.5)  # of a mean of 6 documents
    assert found.bos_added is False
    one = evaluate_tasks(model, tokenizer, ["letters"], folder=folder / "tasks", limit=1)
    assert one.scores["letters"]["acc"] in (0.0, 1.0) and one.bos == "auto"
    with_bos = evaluate_tasks(model, tokenizer, ["letters"], folder=folder / "tasks", bos=True)
    assert with_bos.bos is True and with_bos.bos_added is True
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id  # the caller's own is left alone
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="has no BOS token to begin with"):
        evaluate_tasks(model, tokenizer, ["letters"], folder=folder / "tasks", bos=True)


def test_the_command_compares_and_records(folder, capsys):
    argv = ["eval", str(folder / "checkpoint"), "--tasks", "letters", "--task-dir", str(folder / "tasks"), "--json"]
    before = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert cli.main([*argv, "--no-record"]) == 0
    assert json.loads((folder / "checkpoint" / "config.json").read_text()) == before
    capsys.readouterr()
    assert cli.main([*argv, "--against", str(folder / "float"), "--no-bos"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["scores"]["letters"]["acc"] == found["against"]["tasks"]["scores"]["letters"]["acc"]
    after = json.loads((folder / "checkpoint" / "config.json").read_text())
    kept = after["quantization_config"]["recorded"].pop("evaluations")
    beside = {key: found["against"]["tasks"][key] for key in ("scores", "errors")}
    assert after == before
    assert kept == {"tasks:letters": {**found["tasks"], "against": {"model": "float", **beside}}}
    cli.common.load(str(folder / "checkpoint"), dtype="auto")  # the record does not disturb the digest


def test_bad_input_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.evaluate, "load", lambda *_, **__: pytest.fail("loaded"))
    for options, words in (
        ([], "nothing to measure"),
        (["--tasks", "leters", "--task-dir", str(folder / "tasks")], 'did you mean "letters"'),
        (["--tasks", "letters", "--task-dir", str(tmp_path)], "no folder with task YAMLs"),
        (["--tasks", ","], "nothing to measure"),
    ):
        assert cli.main(["eval", str(folder / "float"), *options]) == 2
        assert words in capsys.readouterr().err


def test_data_on_the_hub_are_missed_before_a_model_is_loaded(folder, monkeypatch, capsys):
    """The real libraries, offline: the task is one that lm-eval brings along."""
    monkeypatch.setattr(cli.evaluate, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["eval", str(folder / "float"), "--tasks", "lambada_openai"]) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the data of lambada_openai could not be fetched (HF_HUB_OFFLINE" in errors[0] and "--task-dir" in errors[0]


def test_a_missing_data_file_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.evaluate, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "letters.yaml").write_text(YAML.format(file=tmp_path / "gone.jsonl").replace("letters", "others"))
    assert cli.main(["eval", str(folder / "float"), "--tasks", "others", "--task-dir", str(tmp_path)]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_without_lm_eval_the_error_names_the_command(folder, monkeypatch, capsys):
    monkeypatch.setattr("optimum_mobilequant.evaluate.tasks.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "optimum-mobilequant\[eval\]"'):
        load_tasks(["letters"])
    assert cli.main(["eval", str(folder / "float"), "--tasks", "letters"]) == 2
    assert 'pip install "optimum-mobilequant[eval]"' in capsys.readouterr().err


def test_every_option_reaches_lm_eval(folder, monkeypatch, capsys):
    import lm_eval

    seen = {}
    real = lm_eval.simple_evaluate

    def spy(harness, **options):
        seen.update(options, bos=harness.add_bos_token, batch=harness.batch_size)
        return real(harness, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", spy)
    argv = ["eval", str(folder / "checkpoint"), "--tasks", "letters", "--task-dir", str(folder / "tasks")]
    argv += ["--limit", "4", "--shots", "1", "--batch-size", "2", "--seed", "5", "--bos", "--no-record"]
    assert cli.main(argv) == 0
    assert (seen["limit"], seen["num_fewshot"], seen["batch"], seen["bos"]) == (4, 1, 2, True)
    assert {seen[name] for name in seen if name.endswith("_seed")} == {5}
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "metric", "value", "stderr"] and table[1].split()[:2] == ["letters", "acc"]
    assert len(table) == 2  # what lm-eval prints while it works goes elsewhere


def test_against_float_is_the_recorded_base_model(folder, tmp_path, capsys):
    copy = shutil.copytree(folder / "checkpoint", tmp_path / "copy")
    argv = ["eval", str(copy), "--tasks", "letters", "--task-dir", str(folder / "tasks"), "--against", "float"]
    assert cli.main(argv) == 2
    assert "does not record its float model" in capsys.readouterr().err
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["recorded"]["base_model"] = "org/base"
    (copy / "config.json").write_text(json.dumps(config))
    names = []
    real = cli.evaluate.load

    def load(name, dtype):
        names.append(name)
        return real(str(folder / "float") if name == "org/base" else name, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.evaluate, "load", load)
        assert cli.main(argv) == 0
    assert names == [str(copy), "org/base"]
    recorded = json.loads((copy / "config.json").read_text())["quantization_config"]["recorded"]
    assert recorded["evaluations"]["tasks:letters"]["against"]["model"] == "org/base"


def test_only_checkpoints_take_a_record(folder):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        record_evaluation(folder / "float", "x", {})


def test_the_string_form_of_lm_eval_gives_the_same_once_the_package_is_imported(folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    arguments = {"task_manager": manager, "bootstrap_iters": 0, "device": "cpu"}
    found = lm_eval.simple_evaluate("hf", f"pretrained={folder / 'checkpoint'}", tasks=["letters"], **arguments)
    model, tokenizer = cli.common.load(str(folder / "checkpoint"), dtype="auto")
    scores = evaluate_tasks(model, tokenizer, ["letters"], folder=folder / "tasks").scores
    assert found["results"]["letters"]["acc,none"] == scores["letters"]["acc"]


def test_the_harness_command_loads_a_checkpoint(folder):
    arguments = [
        "run",
        "--model",
        "hf",
        "--tasks",
        "letters",
        "--include_path",
        str(folder / "tasks"),
        "--device",
        "cpu",
    ]
    arguments += ["--model_args", f"pretrained={folder / 'checkpoint'}"]
    command = [sys.executable, "-m", "optimum_mobilequant.cli", "lm-eval", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "|letters|" in done.stdout.replace(" ", "")
