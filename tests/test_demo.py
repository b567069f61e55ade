"""What the demo may replace in its output folder; the demo itself runs in `make demo`."""

import pytest

from examples.demo import PRESETS, RECIPES, REPORTED, Output, show
from optimum_mobilequant import cli
from optimum_mobilequant.config.recipes import RECIPES as KNOWN_RECIPES
from optimum_mobilequant.plan import PRESETS as KNOWN_PRESETS
from tests import tiny


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_demo_uses_known_names():
    assert set(PRESETS) <= set(KNOWN_PRESETS)
    assert set(RECIPES) <= set(KNOWN_RECIPES)


def test_a_second_run_replaces_what_the_first_wrote_and_nothing_else(tmp_path):
    tmp_path.joinpath("notes.txt").write_text("precious")
    first = Output(tmp_path)
    first.save("w4a8", tiny.build("llama", num_hidden_layers=1), NoTokenizer())
    first.write("demo.json", "1")
    before = files_of(tmp_path)
    second = Output(tmp_path)
    second.save("w4a8", tiny.build("llama", num_hidden_layers=1, seed=5), NoTokenizer())
    second.write("demo.json", "2")
    after = files_of(tmp_path)
    assert after.keys() == before.keys()
    assert after["notes.txt"] == b"precious"
    assert after["demo.json"] == b"2"
    assert after["w4a8/model.safetensors"] != before["w4a8/model.safetensors"]


def test_the_end_says_what_was_made_where_and_what_to_try(tmp_path, capsys):
    common = {"perplexity": 6.0, "bytes": 2_000_000, "minutes": 1.5}
    rows = [common | {"preset": "float32", "recipe": "float", "gap": 0.0}]
    rows += [common | {"preset": preset, "recipe": "mobilequant", "gap": 0.02} for preset in PRESETS]
    show({"rows": rows, "sample": "def f(x):", "reload_bitwise": True, "seconds": 271.4}, tmp_path)
    text = capsys.readouterr().out
    for words in ("271 seconds", str(tmp_path), "2.0 MB", "+2.00%", "report.html", "def f(x):", "equal bit for bit"):
        assert words in text, words
    commands = [line.split()[1:] for line in text.partition("try next:")[2].strip().splitlines()]
    assert len(commands) == 3
    for words in commands:
        assert cli.build_parser().parse_args(words).run_command
    assert REPORTED in PRESETS


@pytest.mark.parametrize("name", ["demo.json", "report.html", "w8a8/model.safetensors", "w4a8/deep/notes.txt"])
def test_a_file_of_somebody_else_in_the_way_stops_the_demo(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    with pytest.raises(SystemExit, match="was not written by the demo"):
        Output(tmp_path)
    assert files_of(tmp_path) == {name: b"precious"}


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    out = Output(tmp_path)
    out.save("w8a8", tiny.build("llama", num_hidden_layers=1), NoTokenizer())
    before = files_of(tmp_path)

    class Full:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(OSError):
        Output(tmp_path).save("w8a8", tiny.build("llama", num_hidden_layers=1, seed=5), Full())
    assert files_of(tmp_path) == before
