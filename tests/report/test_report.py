"""The report of a checkpoint, of a run, and of a run that was interrupted; as HTML, Markdown and JSON."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import cli, quantize
from optimum_mobilequant.report import collect_report, to_html, to_markdown
from optimum_mobilequant.report.advice import advice
from tests import tiny

TEXT = "the dog met a cat and they went to the park " * 8
LETTERS = " abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A learned checkpoint with its run directory."""
    folder = tmp_path_factory.mktemp("report")
    config = tiny.config("w8a8", recipe="mobilequant", effort="light", steps=2)
    quantize(tiny.build("llama-gqa"), None, config, run_dir=str(folder / "run")).save_pretrained(folder / "checkpoint")
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder / "checkpoint")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return collect_report(
        folder / "checkpoint", run_dir=folder / "run", text=TEXT, seq_len=16, tokens=64, command="mobilequant report x"
    )


class Page(HTMLParser):
    """Collects tags that are open, headings and texts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.counts, self.attributes = [], {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing_else(report):
    page = to_html(report)
    parsed = Page(page)
    assert not parsed.open and parsed.counts["html"] == 1
    assert parsed.counts["svg"] >= 4 and parsed.counts["table"] >= 6
    assert "script" not in parsed.counts and "img" not in parsed.counts
    links = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert links == ["data:,"] and "url(" not in page
    assert len(page.encode()) < 3_000_000
    for heading in (
        "Result",
        "Stages",
        "Learning",
        "Worst sites",
        "Distribution",
        "Learned parameters",
        "Environment",
    ):
        assert f"<h2>{heading}</h2>" in page, heading


def test_numbers_are_those_of_the_run(folder, report):
    recorded = json.loads((folder / "checkpoint" / "config.json").read_text())["quantization_config"]["recorded"]
    assert report.perplexity == recorded["validation_perplexity"]
    text = to_markdown(report)
    assert f"{recorded['validation_perplexity']['quantized']:.4f}" in text
    assert report.history["learn"] == [tuple(pair) for pair in recorded["history"]]
    assert report.stages["learn"] == "finished" and report.stages["finetune"] == "-"
    assert report.calibrated and report.scales


def test_errors_of_sites_are_those_of_a_computation_by_hand(folder, report):
    from optimum_mobilequant import set_backend
    from optimum_mobilequant.nn.quantizer import Quantizer

    model, tokenizer = cli.common.load(str(folder / "checkpoint"), dtype=torch.float32)
    set_backend(model, "simulate")
    name = "model.layers.1.mlp.down_proj.input"
    (quantizer,) = [m for m in model.modules() if isinstance(m, Quantizer) and m.spec.name == name]
    kept = []
    quantizer.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:64]).view(4, 16)
    with torch.no_grad():
        model(ids, use_cache=False)
    before, after = (torch.cat([pair[i].flatten() for pair in kept]).double() for i in (0, 1))
    site = report.sites.sites[name]
    wanted = 10 * torch.log10(before.square().sum() / (before - after).square().sum())
    assert site["sqnr_db"] == pytest.approx(float(wanted), rel=1e-4)
    assert site["seen"] == pytest.approx([float(before.min()), float(before.max())], rel=1e-5)
    assert (site["role"], site["layer"], site["bits"]) == ("product", 1, 8)
    worst = [found["sqnr_db"] for _, found in report.sites.worst(5)]
    assert worst == sorted(worst) and report.sites.histogram["name"] == report.sites.worst(1)[0][0]
    assert sum(report.sites.histogram["before"]) == sum(report.sites.histogram["after"]) > 0


def test_a_clipped_site_is_told_from_a_coarse_one():
    site = {"clipped": 0.0, "bits": 8, "role": "gate", "seen": [-1.0, 1.0], "range": [-1.0, 1.0]}
    assert "8 bits are few" in advice(site)
    assert "outside its range" in advice(site | {"clipped": 0.1})
    assert "several times" in advice(site | {"range": [-30.0, 30.0]})


def test_an_interrupted_run_shows_what_is_there(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    for file in run.glob("*.safetensors"):
        if int(file.name[:2]) > 20:
            file.unlink()
    found = collect_report(run)
    assert found.kind == "run" and found.stages["calibrate"] == "finished" and found.stages["pack"] == "-"
    page = to_html(found)
    assert "has not finished" in page and "<h2>Stages</h2>" in page and "<h2>Learning</h2>" not in page
    (run / "20_transform.safetensors").write_bytes(b"broken")
    assert collect_report(run).stages["transform"].startswith("unreadable")


def test_names_from_files_are_escaped(report):
    from dataclasses import replace

    page = to_html(replace(report, title="<script>alert(1)</script>", settings={"<b>": "a & b"}))
    assert "<script>" not in page and "&lt;b&gt;" in page and "a &amp; b" in page


def test_the_command_writes_by_the_name_of_the_file(folder, tmp_path, capsys):
    for name, start in (("r.html", "<!doctype html>"), ("r.md", "# checkpoint"), ("r.json", "{")):
        assert cli.main(["report", str(folder / "checkpoint"), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text().startswith(start)
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "checkpoint"
    capsys.readouterr()
    before = (tmp_path / "r.md").read_bytes()
    assert cli.main(["report", str(folder / "checkpoint"), "--out", str(tmp_path / "r.md")]) == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "r.md").read_bytes() == before
    assert cli.main(["report", str(folder / "checkpoint"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "checkpoint"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{0}/none"], "no folder"),
        (["{0}"], "neither a checkpoint"),
        (["{0}/run", "--text", "{0}/text.txt"], "measured on a checkpoint"),
        (["{0}/checkpoint", "--site", "x"], "give --text"),
        (["{0}/checkpoint", "--run-dir", "{0}"], "no run directory"),
        (["{0}/checkpoint", "--text", "{0}/text.txt", "--seq-len", "4000"], "one window 4000"),
        (
            ["{0}/checkpoint", "--text", "{0}/text.txt", "--seq-len", "8", "--site", "model.layers.0.outputs"],
            "did you mean",
        ),
    ],
)
def test_bad_input_is_one_line(folder, arguments, words, capsys):
    assert cli.main(["report", *(argument.format(folder) for argument in arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line


def test_a_browser_draws_it(report, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    (tmp_path / "page.html").write_text(to_html(report), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "</html>" in done.stdout
    assert done.stdout.count("<svg") == to_html(report).count("<svg")
    assert not re.findall(r"CONSOLE|Uncaught|net::ERR", done.stderr), done.stderr
