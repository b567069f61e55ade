"""The paper's Tables 1 to 4, a command for each cell, and the cells that were run.

    python benchmarks/paper_table.py --write                               # benchmarks/paper_table.md from the results
    python benchmarks/paper_table.py --commands --models TinyLlama-1.1B    # what --run would run
    python benchmarks/paper_table.py --run --models TinyLlama-1.1B --device cuda --out runs/paper
    python benchmarks/paper_table.py --run --models demo_model --rows "W8A8 SmoothQuant*"

A cell is one ``mobilequant quantize`` and one measurement, both shown in the page. ``--run`` runs what has no result
yet and keeps each in ``benchmarks/results/paper_table.json``; the page shows "not run" for the others. Numbers of the
paper (arXiv 2408.13933) stand in columns of their own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from table import cpu_name, markdown

from optimum_mobilequant.data.stdlib_corpus import stdlib_texts
from optimum_mobilequant.run.prepare import versions

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "paper_table.md", HERE / "results" / "paper_table.json"


@dataclass(frozen=True)
class Subject:
    """A model, the data to calibrate on, and how one cell of it is measured."""

    name: str
    model: str
    data: str
    measure: str
    tasks: str = ""


# The paper: Pile's validation part, 2048 tokens, lm-eval without BOS.
_PILE = (
    "--dataset mit-han-lab/pile-val-backup --set dataset_split=validation --set seq_len=2048 --set batch_size=1 "
    "--set bos=false"
)
_HARNESS = (
    "mobilequant lm-eval run --model hf "
    "--model_args pretrained={out},max_length=2048,dtype=float32,add_bos_token=False "
    "--tasks {tasks} --batch_size 1 --device {device} --output_path {out}.scores"
)
_BIG = (
    ("TinyLlama-1.1B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ("StableLM-2-1.6B", "stabilityai/stablelm-2-1_6b"),
    ("Gemma-2B", "google/gemma-2b"),
)
TASKS = "arc_challenge,hellaswag,mmlu"
SUBJECTS = {
    **{name: Subject(name, model, _PILE, _HARNESS, "wikitext") for name, model in _BIG},
    "demo_model": Subject(
        "demo_model",
        "examples/demo_model",
        "--dataset python-stdlib --set bos=false",
        "mobilequant eval {out} --text {text} --json --no-record",
    ),
}


@dataclass(frozen=True)
class Row:
    """A row of a table: what is quantized and how, the effort of a small run, and the paper's numbers."""

    name: str
    options: str  # of ``mobilequant quantize``; empty for the float model
    budget: str = ""  # sizes at the paper's scale; the demo model has the default effort's
    paper: tuple[str, ...] = ()


ONCE = "--set samples=512"
BLOCKS = "--set samples=128 --set steps=2560"  # 128 sequences, 20 times
WHOLE = "--set samples=1024 --set steps=61440"  # 1024 sequences, 60 times
PERPLEXITY = (
    Row("FP16", "", paper=("14.9", "28.4", "18.0")),
    Row("W8A8 SmoothQuant-Static", "--preset w8a8-paper --recipe smoothquant", ONCE, ("177", "583", "> 1000")),
    Row("W8A8 SmoothQuant-Edge", "--preset w8a8-paper --recipe smoothquant-edge", ONCE, ("27.1", "74.5", "45.3")),
    Row("W8A8 OmniQuant-Static", "--preset w8a8-paper --recipe omniquant-static", BLOCKS, ("51.0", "298.6", "> 1000")),
    Row("W8A8 OmniQuant-Edge", "--preset w8a8-paper --recipe omniquant-edge", BLOCKS, ("16.3", "30.9", "23.4")),
    Row("W8A8 OmniQuant-Edge, learned ranges", "--preset w8a8-paper --recipe omniquant-edge --set learn_ranges=true",
        BLOCKS, ("15.9", "30.5", "22.8")),
    Row("W8A8 MobileQuant", "--preset w8a8-paper --recipe mobilequant", WHOLE, ("15.5", "29.7", "20.3")),
    Row("W4A8 OmniQuant-Static", "--preset w4a8-asym --recipe omniquant-static", BLOCKS, ("416.3", "258.5", "> 1000")),
    Row("W4A8 OmniQuant-Edge", "--preset w4a8-asym --recipe omniquant-edge", BLOCKS, ("18.8", "36.0", "23.9")),
    Row("W4A8 OmniQuant-Edge, learned ranges", "--preset w4a8-asym --recipe omniquant-edge --set learn_ranges=true",
        BLOCKS, ("18.3", "35.4", "23.0")),
    Row("W4A8 MobileQuant, asymmetric", "--preset w4a8-asym --recipe mobilequant", WHOLE, ("17.1", "33.6", "21.4")),
    Row("W4A8 MobileQuant, symmetric", "--preset w4a8 --recipe mobilequant", WHOLE, ("17.5", "36.4", "24.7")),
    Row("W8A8 `best`, ours", "--preset w8a8 --recipe best", f"{WHOLE} --set rounding_steps=15360"),
    Row("W4A8 `best`, ours", "--preset w4a8 --recipe best", f"{WHOLE} --set rounding_steps=15360"),
)  # fmt: skip
_BUDGETS = {  # samples x passes: (block-wise, end-to-end) of the three models
    (128, 20): ("18.3 / 19.9", "35.4 / 40.4", "23.0 / 32.5"),
    (128, 60): ("18.3 / 17.4", "37.0 / 36.5", "23.7 / 26.1"),
    (128, 120): ("18.1 / 17.1", "37.1 / 35.1", "24.0 / 23.1"),
    (256, 60): ("17.9 / 17.1", "35.9 / 34.2", "24.5 / 22.0"),
    (1024, 60): ("17.7 / 17.1", "35.4 / 33.6", "24.9 / 21.4"),
}
BUDGETS = tuple(
    Row(f"{samples} x {passes}, {name}", f"--preset w4a8-asym{options}",
        f"--set samples={samples} --set steps={samples * passes}", tuple(pair.split(" / ")[part] for pair in numbers))
    for (samples, passes), numbers in _BUDGETS.items()
    for part, (name, options) in enumerate(
        (("block-wise", " --recipe omniquant-edge --set learn_ranges=true"), ("end-to-end", " --recipe mobilequant")))
)  # fmt: skip
_DOWNSTREAM = {
    "FP16": ("33 / 60 / 25", "39 / 65 / 32", "23 / 42 / 28"),
    "W8A8 SmoothQuant-Edge": ("29.6 / 52.8 / 24.9", "35.9 / 61.8 / 26.0", "23.0 / 39.0 / 25.8"),
    "W8A8 OmniQuant-Edge": ("31.7 / 58.4 / 24.9", "36.3 / 63.4 / 29.3", "22.4 / 39.9 / 26.8"),
    "W8A8 MobileQuant": ("31.9 / 59.2 / 25.0", "37.1 / 63.6 / 30.0", "21.8 / 40.9 / 25.8"),
    "W4A8 OmniQuant-Edge": ("28.8 / 56.4 / 25.5", "34.9 / 60.2 / 25.9", "23.1 / 38.1 / 25.5"),
    "W4A8 MobileQuant, asymmetric": ("32.3 / 57.0 / 25.5", "35.6 / 60.5 / 24.1", "23.0 / 38.9 / 25.6"),
}
DOWNSTREAM = tuple(
    Row(row.name, row.options, row.budget, _DOWNSTREAM[row.name]) for row in PERPLEXITY if row.name in _DOWNSTREAM
)
TABLES = {
    "Tables 1 and 3: word perplexity on WikiText": PERPLEXITY,
    "Table 2: sequences x passes, W4A8 asymmetric, learned ranges": BUDGETS,
    "Table 4: accuracy on ARC-challenge / HellaSwag / MMLU, %": DOWNSTREAM,
}


def folder_of(subject: Subject, row: Row, out: Path) -> str:
    name = "".join(
        letter if letter.isalnum() else "-" for letter in f"{row.options} {row.budget}" if letter not in "'\"`"
    )
    return (out / subject.name / "-".join(part for part in name.split("-") if part and part != "set")).as_posix()


def commands(subject: Subject, row: Row, tasks: str, *, device: str, out: Path) -> list[str]:
    """The command lines of one cell: quantize, unless it is the float model, then measure."""
    big = bool(subject.tasks)
    folder = subject.model if not row.options else folder_of(subject, row, out)
    lines = []
    if row.options:
        parts = [f"mobilequant quantize {subject.model}", row.options, subject.data]
        parts += [row.budget, f"--device {device}"] if big else []
        lines.append(" ".join([*parts, f"--out {folder} --run-dir {folder}.run"]))
    scores = folder if row.options else (out / subject.name / "float").as_posix()
    measure = subject.measure.replace("{out}.scores", f"{scores}.{tasks.replace(',', '-')}")
    lines.append(measure.format(out=folder, tasks=tasks, device=device, text=(out / "python-stdlib.txt").as_posix()))
    return lines


def run(subject: Subject, row: Row, tasks: str, args: argparse.Namespace) -> dict[str, float]:
    """Run the commands of a cell; the metrics that they give."""
    text = args.out / "python-stdlib.txt"
    if not subject.tasks and not text.is_file():
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(stdlib_texts("test"))[:200_000], encoding="utf-8")
    *first, last = commands(subject, row, tasks, device=args.device, out=args.out)
    for line in first:
        if not (Path(shlex.split(line)[-3]) / "config.json").is_file():
            subprocess.run(_ours(line), check=True)
    done = subprocess.run(_ours(last), check=True, stdout=None if subject.tasks else subprocess.PIPE, text=True)
    if not subject.tasks:
        return {"perplexity": json.loads(done.stdout)["perplexity"]}
    return scores_of(Path(shlex.split(last)[-1]), tasks)


def _ours(line: str) -> list[str]:
    return [sys.executable, "-m", "optimum_mobilequant.cli", *shlex.split(line)[1:]]


def scores_of(folder: Path, tasks: str) -> dict[str, float]:
    """Word perplexity, or accuracies in percent, from the newest result of lm-eval in ``folder``."""
    newest = max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    found = json.loads(newest.read_text(encoding="utf-8"))["results"]
    metric = {"wikitext": "word_perplexity,none", "hellaswag": "acc_norm,none"}
    return {
        task: found[task][metric.get(task, "acc,none")] * (1 if task == "wikitext" else 100)
        for task in tasks.split(",")
    }


def cells_of(args: argparse.Namespace) -> list[tuple[Subject, Row, str, str]]:
    """Subject, row, tasks and key of each wanted cell, once."""
    found = {}
    for title, rows in TABLES.items():
        for name in args.models:
            for row in rows:
                subject, tasks = SUBJECTS[name], TASKS if title.startswith("Table 4") else "wikitext"
                if any(fnmatch(row.name, pattern) for pattern in args.rows) and (subject.tasks or rows is PERPLEXITY):
                    found.setdefault(key_of(subject, row, tasks), (subject, row, tasks))
    return [(*cell, key) for key, cell in found.items()]


def key_of(subject: Subject, row: Row, tasks: str) -> str:
    what = f"{row.options} {row.budget if subject.tasks else ''}".strip() or "float"
    return f"{subject.name}: {what}: {tasks if subject.tasks else 'text'}"


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    big = [subject for subject in SUBJECTS.values() if subject.tasks]
    small = [subject for subject in SUBJECTS.values() if not subject.tasks]
    lines = ["# The paper's tables", "", *INTRODUCTION.splitlines(), ""]
    for title, rows in TABLES.items():
        tasks = TASKS if title.startswith("Table 4") else "wikitext"
        shown = [*big, *(small if rows is PERPLEXITY else [])]
        header = ["", *(f"{subject.name}, {who}" for subject in big for who in ("paper", "here"))]
        header += [f"{subject.name}, here" for subject in shown[len(big) :]]
        table = []
        for row in rows:
            cells = [row.name]
            for index, subject in enumerate(shown):
                if subject.tasks:
                    cells.append(row.paper[index] if row.paper else "")
                cells.append(
                    _shown(results.get(key_of(subject, row, tasks)), results.get(key_of(subject, rows[0], tasks)))
                )
            table.append(cells)
        lines += [f"## {title}", "", markdown(header, table), ""]
    lines += ["## Commands", "", *COMMANDS.splitlines(), ""]
    for title, rows in TABLES.items():
        tasks = TASKS if title.startswith("Table 4") else "wikitext"
        lines += [f"{title.partition(':')[0]}, {big[0].name}:", "", "```bash"]
        said: set[str] = set()
        for row in rows:
            new = [
                line
                for line in commands(big[0], row, tasks, device="cuda", out=Path("runs/paper"))
                if line not in said
            ]
            lines += [f"# {row.name}", *new]
            said.update(new)
        lines += ["```", ""]
    lines += ["demo_model:", "", "```bash"]
    for row in PERPLEXITY:
        lines += [f"# {row.name}", *commands(small[0], row, "", device="cpu", out=Path("runs/paper"))]
    return "\n".join([*lines, "```", ""])


def _shown(found: dict[str, Any] | None, reference: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    values = found["scores"]
    text = " / ".join(f"{value:.1f}" if name != "perplexity" else f"{value:.3f}" for name, value in values.items())
    if "perplexity" in values and reference is not None and reference is not found:
        text += f" ({values['perplexity'] / reference['scores']['perplexity']:.3f})"
    return text


INTRODUCTION = """\
The rows of Tables 1 to 4 of MobileQuant (Tan et al., EMNLP 2024,
[arXiv 2408.13933](https://arxiv.org/abs/2408.13933)). "paper" columns are the paper's own numbers. "here" columns are
measured with the commands below, by `python benchmarks/paper_table.py --run`, and say "not run" where they were not:
the paper's three models need a GPU, and a network for models and data. `demo_model` is the model embedded in the
repository: perplexity of each token on text of the Python standard library, chunks of 256 tokens, and its ratio to
float. It shows the order of the methods, and nothing about their gaps on models of billions of parameters.

What differs from the paper by design: in the symmetric row q and k stay at 16 bits until they are rotated; embedding,
head, residual sums and rotary tables are quantized, which the paper's simulation leaves in float; the `mobilequant`
recipe minimises the divergence of the logits; ranges are learned as logarithms, with learning rates to match (see
`docs/method.md`). The paper does not say which TinyLlama it took; the float row will tell whether it is this one."""

COMMANDS = """\
From the root of the repository. For StableLM-2 (`stabilityai/stablelm-2-1_6b`) and Gemma (`google/gemma-2b`, whose
licence has to be accepted on the Hub) only the name of the model and of the folders differ; to print them:
`python benchmarks/paper_table.py --commands --models StableLM-2-1.6B Gemma-2B`. Tests run each distinct form on small
random models of the three architectures, with two steps instead of thousands."""


def main() -> None:
    args = parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for subject, row, tasks, key in cells_of(args) if args.run or args.commands else []:
        if args.commands:
            print(f"# {row.name}", *commands(subject, row, tasks, device=args.device, out=args.out), sep="\n")
        elif key not in results:
            scores = run(subject, row, tasks, args)
            about = {"cpu": cpu_name(), "device": args.device, "versions": versions()}
            results[key] = {"scores": scores, "about": about}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(key, scores, flush=True)
    if args.write:
        PAGE.write_text(page(results), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", action="store_true", help="print what --run would run")
    parser.add_argument("--run", action="store_true", help="measure the cells that have no result")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="MODEL")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="names of rows, with wildcards")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="for checkpoints")
    args = parser.parse_args()
    if not (args.commands or args.run or args.write):
        parser.error("give --commands, --run or --write")
    return args


if __name__ == "__main__":
    main()
