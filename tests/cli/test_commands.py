import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import optimum_mobilequant
from optimum_mobilequant import cli
from optimum_mobilequant.cli import common as cli_common
from optimum_mobilequant.config import MobileQuantConfig
from tests.cli.test_parser import quantize_args


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """A random two-layer Llama with a byte tokenizer, saved."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 40, encoding="utf-8")
    return path


@pytest.fixture
def calls(monkeypatch):
    """Replaces the method by a recorder that returns the model as it is: here only the command around it counts."""
    seen = SimpleNamespace(config=None, run_dir=None, count=0, before_return=lambda: None)

    def quantize(model, tokenizer, config, *, run_dir=None):
        seen.config, seen.run_dir, seen.count = config, run_dir, seen.count + 1
        seen.before_return()
        return model

    monkeypatch.setattr(optimum_mobilequant, "MobileQuantConfig", MobileQuantConfig, raising=False)
    monkeypatch.setattr(optimum_mobilequant, "quantize", quantize, raising=False)
    return seen


def one_error_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


# Parser


def test_bad_input_is_one_line_and_loads_nothing(calls, float_model, text_file, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("precious")
    out = tmp_path / "out"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = {
        "no folder": quantize_args(tmp_path / "nothing", text_file, out),
        "is a file": quantize_args(text_file, text_file, out),
        "no config.json": quantize_args(full, text_file, out),
        "does not exist": quantize_args(float_model, tmp_path / "missing.txt", out),
        "is empty": quantize_args(float_model, empty, out),
        "not empty": quantize_args(float_model, text_file, full),
        "no saved model": quantize_args(float_model, text_file, full, "--overwrite"),
        "a file: give --out": quantize_args(float_model, text_file, text_file),
        "cannot write in": quantize_args(float_model, text_file, text_file / "below"),
        "inside --out": quantize_args(float_model, text_file, out, "--run-dir", out / "run"),
        "use --run-dir": quantize_args(float_model, text_file, out, "--set", "run_dir=run"),
        "given twice": quantize_args(float_model, text_file, out, "--set", "steps=1", "--set", "steps=2"),
        'did you mean "effort"': quantize_args(float_model, text_file, out, "--set", "efort=none"),
        "samples must be": quantize_args(float_model, text_file, out, "--set", "samples=many"),
        'did you mean "rtn"': quantize_args(float_model, text_file, out, "--recipe", "rnt"),
        "cannot be used here": quantize_args(float_model, text_file, out, "--device", "abacus"),
    }
    for words, argv in cases.items():
        assert cli.main(argv) == 2, words
        assert words in one_error_line(capsys)
    assert calls.count == 0
    assert not out.exists()
    assert (full / "notes.txt").read_text() == "precious"


def test_damaged_float_models_are_refused(calls, float_model, text_file, tmp_path, capsys):
    """Not completed with random weights, and no traceback."""
    import shutil

    short, cut = (shutil.copytree(float_model, tmp_path / name) for name in ("short", "cut"))
    content = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3, "layer_types": None}))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:2000])
    for folder, message in ((short, "lacks 9 weights, among them model.layers.2."), (cut, "damaged or truncated")):
        assert cli.main(quantize_args(folder, text_file, tmp_path / "out")) == cli.BAD_INPUT
        assert message in capsys.readouterr().err
    assert calls.count == 0 and not (tmp_path / "out").exists()


def test_overwrite_does_not_take_the_input_away(calls, float_model, text_file, capsys):
    files = {path: path.read_bytes() for path in float_model.iterdir()}
    assert cli.main(quantize_args(float_model, text_file, float_model, "--overwrite")) == 2
    assert "inside --out" in one_error_line(capsys)
    assert {path: path.read_bytes() for path in float_model.iterdir()} == files


def test_a_hub_id_may_equal_the_output(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli_common.check_apart(tmp_path / "owner" / "name", "MODEL", cli_common.check_model("owner/name"))


def test_eval_refuses_bad_text(float_model, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("müde".encode("latin-1"))
    for name, words in {"none.txt": "no text file", "empty.txt": "is empty", "latin.txt": "is not UTF-8"}.items():
        assert cli.main(["eval", str(float_model), "--text", str(tmp_path / name)]) == 2
        assert words in one_error_line(capsys)


def test_traceback_only_on_request(float_model, tmp_path, capsys):
    argv = ["eval", str(float_model), "--text", str(tmp_path / "none.txt")]
    assert cli.main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main([*argv, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_text_of_several_lines_is_put_on_one(capsys):
    def fail(args):
        raise OSError("first\n  second")

    args = cli.build_parser().parse_args(["doctor"])
    args.run_command = fail
    assert cli.run(args) == 2
    assert one_error_line(capsys) == "error: first second"


@pytest.mark.parametrize("error", [FloatingPointError("diverged"), RuntimeError("out of memory")])
def test_a_failed_run_exits_with_1(error, capsys):
    def fail(args):
        raise error

    args = cli.build_parser().parse_args(["doctor"])
    args.run_command = fail
    assert cli.run(args) == 1
    assert one_error_line(capsys) == f"error: {error} (--traceback shows where)"


def test_a_fault_of_our_own_is_not_hidden():
    args = cli.build_parser().parse_args(["doctor"])
    args.run_command = lambda args: {}["missing"]
    with pytest.raises(KeyError):
        cli.run(args)


def test_interrupting_names_the_way_on(calls, float_model, text_file, tmp_path, capsys):
    def interrupt():
        raise KeyboardInterrupt

    calls.before_return = interrupt
    argv = quantize_args(float_model, text_file, tmp_path / "out", "--run-dir", tmp_path / "run")
    assert cli.main(argv) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Output folder


def test_quantize_passes_options_and_saves(calls, float_model, text_file, tmp_path, capsys):
    out, run_dir = tmp_path / "deep" / "out", tmp_path / "run"
    more = ("--seed", 7, "--effort", "none", "--run-dir", run_dir, "--set", "samples=4")
    assert cli.main(quantize_args(float_model, text_file, out, *more)) == 0
    expected = {"preset": "w4a8", "dataset": str(text_file), "effort": "none", "seed": 7, "samples": 4}
    assert calls.config == MobileQuantConfig(**expected)
    assert calls.run_dir == str(run_dir)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert str(out) in capsys.readouterr().out


def test_overwrite_replaces_the_whole_folder(calls, float_model, text_file, tmp_path):
    out = tmp_path / "out"
    argv = quantize_args(float_model, text_file, out)
    assert cli.main(argv) == 0
    (out / "stale.txt").write_text("old")
    assert cli.main(argv) == 2
    assert cli.main([*argv, "--overwrite"]) == 0
    assert not (out / "stale.txt").exists()
    assert (out / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


def test_a_failed_save_keeps_the_old_model(calls, float_model, text_file, tmp_path, monkeypatch, capsys):
    from transformers import PreTrainedTokenizerFast

    out = tmp_path / "out"
    argv = quantize_args(float_model, text_file, out, "--overwrite")
    assert cli.main(argv) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()

    def full_disk(self, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_disk)
    assert cli.main(argv) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


def test_a_full_disk_is_one_line(calls, float_model, text_file, tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert cli.main(quantize_args(float_model, text_file, tmp_path / "out")) == cli.BAD_INPUT
    assert "free some space and run again, with --run-dir" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_folder_filled_meanwhile_is_kept_and_so_is_the_result(calls, float_model, text_file, tmp_path, capsys):
    out = tmp_path / "out"

    def fill():
        out.mkdir()
        (out / "notes.txt").write_text("precious")

    calls.before_return = fill
    assert cli.main(quantize_args(float_model, text_file, out)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "the finished model is in" in message
    assert (out / "notes.txt").read_text() == "precious"
    staged = Path(message.rpartition(" in ")[2].rstrip(")"))
    assert (staged / "config.json").is_file()


# Results


def test_json_has_no_nan(capsys):
    cli_common.print_json({"rows": [{"a": float("inf"), "b": (1.5, float("nan"))}], "c": "x"})
    assert json.loads(capsys.readouterr().out) == {"rows": [{"a": None, "b": [1.5, None]}], "c": "x"}


def test_doctor_prints_json(capsys):
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)


def evaluate(model, text_file, capsys, *more):
    assert cli.main(["eval", str(model), "--text", str(text_file), "--seq-len", "32", *more]) == 0
    return capsys.readouterr().out


def test_eval_measures_a_float_model(float_model, text_file, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mobilequant.evaluate.perplexity import perplexity

    values = json.loads(evaluate(float_model, text_file, capsys, "--bos", "--json"))
    assert set(values) == {"perplexity", "word_perplexity", "tokens", "seconds"}
    model = AutoModelForCausalLM.from_pretrained(float_model)
    tokenizer = AutoTokenizer.from_pretrained(float_model)
    expected = perplexity(model, tokenizer, text_file.read_text(), seq_len=32, bos=True, progress=False)
    assert (values["perplexity"], values["tokens"]) == (expected.perplexity, expected.tokens)
    lines = evaluate(float_model, text_file, capsys).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["perplexity", "word perplexity", "tokens", "seconds"]


def test_a_checkpoint_does_not_tell_its_makers_folders(float_model, text_file, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    options = ["--preset", "w8a8", "--recipe", "rtn", "--effort", "none", "--set", "samples=8", "--set", "seq_len=32"]
    argv = ["quantize", str(float_model), "--dataset", str(text_file), "--out", str(out), "--run-dir", str(run)]
    assert cli.main([*argv, *options]) == 0
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["dataset"] == text_file.name and stored["run_dir"] is None
    assert f'"{text_file.name}"' in stored["recorded"]["data"]
    assert str(text_file.parent) not in (out / "config.json").read_text()
    assert str(tmp_path) not in (out / "config.json").read_text()


def test_quantize_eval_inspect(float_model, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ("--set", "samples=4", "--set", "seq_len=32")
    argv = quantize_args(float_model, text_file, out, "--recipe", "rtn", "--effort", "none", *sizes)
    assert cli.main(argv) == 0, capsys.readouterr().err
    capsys.readouterr()

    before = json.loads(evaluate(float_model, text_file, capsys, "--json"))
    after = json.loads(evaluate(out, text_file, capsys, "--json"))
    assert after["tokens"] == before["tokens"]
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.5)
    assert after["perplexity"] != before["perplexity"]

    assert cli.main(["inspect", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    columns = {"tensor", "role", "bits", "scale", "zero_point", "min", "max", "bytes"}
    assert rows and all(columns <= set(row) for row in rows)
    assert cli.main(["inspect", str(out)]) == 0
    assert rows[0]["tensor"] in capsys.readouterr().out
