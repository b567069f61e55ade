"""The report of a checkpoint, of a run, and of a run that was interrupted; as HTML, Markdown and JSON."""

import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_mobilequant import MobileQuantConfig, cli, quantize
from optimum_mobilequant.report import collect_report, to_html, to_markdown
from optimum_mobilequant.report.advice import advice
from tests import tiny

TEXT = "the dog met a cat and they went to the park " * 8
LADDER = [
    {"recipe": "float", "preset": "float32", "perplexity": 9.0, "gap": 0.0, "minutes": 0.0},
    {"recipe": "rtn", "preset": "w4a8", "perplexity": 18.0, "gap": 1.0, "minutes": 0.1, "added": []},
    {
        "recipe": "best",
        "preset": "w4a8",
        "perplexity": 9.09,
        "gap": 0.01,
        "minutes": 3.0,
        "added": ["rounding=learned"],
    },
    {"recipe": "qad", "preset": "w4a8", "perplexity": None, "gap": None, "error": "diverged"},
]
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
    (folder / "rungs.json").write_text(json.dumps(LADDER))
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return collect_report(
        folder / "checkpoint",
        run_dir=folder / "run",
        ladder=folder / "rungs.json",
        text=TEXT,
        seq_len=16,
        tokens=64,
        command="mobilequant report x",
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
    assert parsed.counts["script"] == 2 and "img" not in parsed.counts
    links = [value for name, value in parsed.attributes if name in ("src", "href")]
    outside = [link for link in links if not link.startswith("#")]
    assert outside == ["data:,"] and "url(" not in page and "default-src 'none'" in page
    anchors = {value for name, value in parsed.attributes if name == "id"}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert len(page.encode()) < 3_000_000
    for heading in (
        "Result",
        "Size and cost",
        "Ladder",
        "Stages",
        "Learning",
        "Bits",
        "Error by layer and site",
        "Worst sites",
        "Distribution",
        "Ranges before and after learning",
        "Learned parameters",
        "Settings",
        "Environment",
        "The run again",
    ):
        assert f">{heading}</h2>" in page, heading


def test_numbers_are_those_of_the_run(folder, report):
    recorded = json.loads((folder / "checkpoint" / "config.json").read_text())["quantization_config"]["recorded"]
    assert report.perplexity == recorded["validation_perplexity"]
    text = to_markdown(report)
    assert f"{recorded['validation_perplexity']['quantized']:.4f}" in text
    assert report.history["learn"] == [tuple(pair) for pair in recorded["history"]]
    assert report.stages["learn"] == "finished" and report.stages["finetune"] == "-"
    assert report.calibrated and report.learned["transforms"] and report.learned["clips"]
    learned = load_file(folder / "run" / "30_learn.safetensors")
    factors = learned["scales.model/layers/1/up_down"].exp()
    ends = report.learned["transforms"]["model.layers.1.up_down"]
    assert ends == pytest.approx((factors.min().item(), factors.median().item(), factors.max().item()), rel=1e-6)
    kept = learned["clips.model/layers/0/mlp/down_proj"].sigmoid()
    assert report.learned["clips"]["model.layers.0.mlp.down_proj"][0] == pytest.approx(kept.min().item())


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
    assert worst == sorted(worst) and report.sites.chosen == report.sites.worst(1)[0][0]
    # the distribution is counted on the first two windows
    counts, first = report.sites.histograms[name], before[: before.numel() // 2]
    bins = torch.histc(first.float(), 48, counts["low"], counts["high"])
    moved = (torch.tensor(counts["before"]) - bins).abs().sum()  # a batch sums in another order
    assert moved <= 4 and sum(counts["before"]) == sum(counts["after"]) == first.numel()
    assert report.sites.histograms.keys() == report.sites.sites.keys()


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
    assert "has not finished" in page and ">Stages</h2>" in page and ">Learning</h2>" not in page
    (run / "20_transform.safetensors").write_bytes(b"broken")
    assert collect_report(run).stages["transform"].startswith("unreadable")


def test_names_from_files_are_escaped(report):
    evil = "</script><script>alert(1)</script>"
    sites = replace(report.sites, chosen=evil)
    for part in (sites.sites, sites.histograms):
        part[evil] = next(iter(part.values()))
    try:
        page = to_html(replace(report, title=evil, settings={"<b>": "a & b"}, sites=sites))
    finally:
        del sites.sites[evil], sites.histograms[evil]
    assert "<script>alert" not in page and "&lt;b&gt;" in page and "a &amp; b" in page
    assert page.count("</script>") == page.count("<script") == 2


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
        (["{0}/checkpoint", "--ladder", "{0}/none.json"], "no file"),
        (["{0}/checkpoint", "--ladder", "{0}/text.txt"], "holds no ladder"),
        (["{0}/checkpoint", "--ladder", "{0}/checkpoint/config.json"], "holds no ladder"),
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


def test_the_ladder_is_shown_by_name_with_what_was_refused(folder, report, tmp_path):
    assert [row["name"] for row in report.ladder] == ["float32 float", "w4a8 rtn", "w4a8 best", "w4a8 qad"]
    page, text = to_html(report), to_markdown(report)
    assert "The bars are logarithmic" in page and "+100.00%" in page  # 1 and 0.01
    assert "refused: diverged" in text and "rounding=learned" in text
    # the same rows, as they lie in a run directory and in the files of benchmarks
    (tmp_path / "ladder.json").write_text(json.dumps({"about": {}, "rungs": LADDER}))
    alone = collect_report(tmp_path)
    assert alone.kind == "ladder" and alone.ladder == report.ladder and ">Ladder</h2>" in to_html(alone)
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row | {"model": "m", "seed": 0} for row in LADDER]}))
    assert collect_report(folder / "checkpoint", ladder=tmp_path / "rows.json").ladder == report.ladder
    shutil.copytree(folder / "run", tmp_path / "w8a8-mobilequant")
    assert collect_report(tmp_path / "w8a8-mobilequant").ladder == report.ladder


def test_the_run_again_is_the_run(report):
    words = shlex.split(report.rerun)
    args = cli.build_parser().parse_args(words[1:])
    assert (args.model, args.preset, args.recipe or "mobilequant", args.effort, args.dataset) == (
        "MODEL",
        "w8a8",
        "mobilequant",
        "light",
        "FILE",
    )
    stored = {key: value for key, value in report.settings.items() if key != "dataset"}
    again = {"preset": args.preset, "effort": args.effort, **dict(args.fields)}
    again |= {"recipe": args.recipe} if args.recipe else {}
    assert MobileQuantConfig.from_dict(again).to_dict() == MobileQuantConfig.from_dict(stored).to_dict()


def test_a_snapshot_of_learning_is_shown(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (run / "40_pack.safetensors").unlink()
    learned = load_file(run / "30_learn.safetensors")
    (run / "30_learn.safetensors").unlink()
    snapshot = {f"{kind}.{key}": value for kind in ("now", "mean", "best") for key, value in learned.items()}
    snapshot = {key: value.clone() for key, value in snapshot.items()}
    meta = {"step": 2, "result": {"history": [[0, 0.5], [2, 0.25]]}}
    save_file(snapshot, run / "30_learn.progress.safetensors", metadata={"meta": json.dumps(meta)})
    found = collect_report(run)
    assert found.stages["learn"] == "under way, 2 steps done"
    assert found.history["learn"] == [(0, 0.5), (2, 0.25)] and found.learned == collect_report(folder / "run").learned
    assert "loss on the validation text" in to_html(found)


def test_a_run_without_a_result_is_an_error(folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(folder / "run" / "fingerprint.json", run)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 2
    assert "no results to report" in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def test_what_is_missing_is_named_with_its_option(folder):
    page = to_html(collect_report(folder / "checkpoint"))
    assert all(option in page for option in ("--text FILE", "--run-dir DIR", "--ladder FILE"))


def test_the_page_of_a_deep_model_is_small(report):
    """80 layers of what a layer has: the limit holds, and the worst sites are in it."""
    layers = {f"model.layers.{i}." for i in range(80)}

    def repeat(values):
        inner = {name: value for name, value in values.items() if ".layers.1." in name}
        return {name.replace("model.layers.1.", layer): value for layer in layers for name, value in inner.items()}

    sites = replace(report.sites, sites=repeat(report.sites.sites), histograms=repeat(report.sites.histograms))
    sites.chosen = sites.worst(1)[0][0]
    assert len(sites.sites) > 1200
    page = to_html(replace(report, sites=sites, calibrated=repeat(report.calibrated)))
    assert len(page.encode()) < 3_000_000 and "with smaller errors are left out" in page


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
# Run by the page itself once it is drawn: chooses another activation, and notes what a person would look at.
PROBE = """
<script>
addEventListener("load", () => {
  const path = () => document.querySelector("#shape .before").getAttribute("d");
  const list = document.getElementById("site"), first = path();
  const cell = document.querySelector(".cell[data-site]:not([data-site=\'" + list.value + "\'])");
  cell.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  const drawn = [...document.querySelectorAll("svg.plot")].map(plot => plot.getBoundingClientRect());
  document.body.dataset.found = JSON.stringify({
    chosen: list.value === cell.dataset.site, redrawn: path() !== first,
    width: document.documentElement.scrollWidth, window: innerWidth,
    plots: drawn.filter(box => box.width > 100 && box.height > 20).length,
    milliseconds: performance.now(),
  });
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_it(report, tmp_path, width):
    page = to_html(report)
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},800", "--dump-dom"]
    command = [BROWSER, *options, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
    assert not re.findall(r"CONSOLE|Uncaught|net::ERR", done.stderr), done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert found["chosen"] and found["redrawn"] and found["plots"] == page.count("<svg") >= 8
    assert found["width"] <= found["window"] == width, "the page is wider than its window"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_an_error_of_the_page_would_be_seen(tmp_path):
    (tmp_path / "page.html").write_text("<script>nothing.there()</script>")
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [BROWSER, *options, (tmp_path / "page.html").as_uri()]
    assert "Uncaught" in subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
