"""This package beside other libraries: the same models, text and bits, every result scored by the same code.

    python benchmarks/peers.py --out peers.json --envs DIR
    python benchmarks/peers.py --out peers.json --envs DIR --append --only 'stories260k/w4a8/auto-round/*' \\
        --models DIR --text NAME=calibration.txt,evaluation.txt,150000

Each library runs in a virtual environment of its own under --envs, made from ``peers/LIBRARY.txt`` when it is first
needed, as a process of ``peers/worker_LIBRARY.py``. The text is tokenised here, once; a worker gets the calibration
sequences that our own run draws (those it holds out included) and the chunks to score, as token ids. A row is refused
where the float model's perplexity in the library's environment is not ours, or where a weight has more levels than its
bits allow. Protocol and options otherwise as in quality.py; rows that the file holds already are not measured again.
``--reuse FILE`` takes our own rows from a file of ladder.py with the same settings and texts.

Schemes, which do not compare at face value: IN quantizes the inputs of the projections, static, one scale per tensor;
DYN the same, with a scale for each token that is found while the model runs; HTP is AIMET's configuration for
Qualcomm's accelerator; ALL is ours, where every tensor has a static encoding. Weights are symmetric, one scale per
output channel. Head and embedding are float in all schemes but ALL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from quality import Subject, Text, add_options, cells_of_perplexity, checked, models_of
from table import Table, markdown, reusable

from optimum_mobilequant.data.run_data import run_data
from optimum_mobilequant.evaluate.perplexity import token_ids

WORKERS = Path(__file__).resolve().parent / "peers"
OURS = "optimum-mobilequant"
PRESETS = {"w8a8": (8, 8), "w4a8": (4, 8)}
KEYS = ("model", "preset", "library", "method")
HEADER = (*KEYS, "scheme", "perplexity", "gap", "minutes")
CLOSE = 1e-4  # two float perplexities of one model
SETTINGS = ("effort", "seed", "seq_len", "quick")


@dataclass(frozen=True)
class Method:
    """One row for each model and preset."""

    library: str
    name: str
    scheme: str

    @property
    def worker(self) -> Path:
        # Not the library's own name: the worker's folder is the first in which it looks for modules.
        return WORKERS / f"worker_{self.library.replace('-', '_')}.py"

    @property
    def requirements(self) -> Path:
        return WORKERS / f"{self.library}.txt"


METHODS = (
    Method("auto-round", "rtn", "IN"),
    Method("auto-round", "autoround", "IN"),
    Method("llmcompressor", "rtn", "IN"),
    Method("llmcompressor", "gptq", "IN"),
    Method("llmcompressor", "smoothquant + gptq", "IN"),
    Method("aimet-torch", "rtn", "HTP"),
    Method("aimet-torch", "seqmse", "HTP"),
    Method("aimet-torch", "adascale", "HTP"),
    Method("torchao", "static", "IN"),
    Method("torchao", "smoothquant", "IN"),
    Method("torchao", "dynamic", "DYN"),
    *(Method(OURS, recipe, "ALL") for recipe in ("rtn", "mobilequant", "best")),
)


def main() -> None:
    args = parse_args()
    models, texts = models_of(args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    table = Table(args.out, settings, append=args.append, keys=KEYS, header=HEADER, cells=cells)
    if args.reuse:
        reuse(args.reuse, table, texts, args)
    for name, folder in models.items():
        missing = [
            (preset, method)
            for preset in PRESETS
            for method in METHODS
            if args.wants(name, preset, method.library, method.name)
            and not table.has(name, preset, method.library, method.name)
        ]
        if missing:
            table.use_text(name, texts[name].record())
            measure(name, folder, texts[name], missing, table, args)
    print(table.markdown(), overview(table.rows), sep="\n\n")


def reuse(path: Path, table: Table, texts: dict[str, Text], args: argparse.Namespace) -> None:
    """Copy the rows of our recipes that a file of ladder.py has and this one lacks."""
    methods = {method.name: method for method in METHODS if method.library == OURS}
    records = {name: text.record() for name, text in texts.items()}
    for row, source in reusable(path, table.settings, records, without=("factor", "share")):
        if row["variant"] != "plain" or row["preset"] not in PRESETS or row["recipe"] not in methods:
            continue
        key = (row["model"], row["preset"], OURS, row["recipe"])
        if args.wants(*key) and not table.has(*key):
            table.use_text(row["model"], records[row["model"]])
            values = {name: row[name] for name in ("perplexity", "gap", "minutes", "extras", "error")}
            table.add(*key, values={"scheme": methods[row["recipe"]].scheme} | values | source)


def measure(
    name: str, folder: Path, text: Text, wanted: list[tuple[str, Method]], table: Table, args: argparse.Namespace
) -> None:
    """Add the float row of a model and the rows of ``wanted`` to the table."""
    subject = Subject(folder, text, args)
    key = (name, "float32", OURS, "float")
    reference = table.find(*key)
    if reference is None:
        value = subject.score(subject.load("plain"))
        reference = table.add(*key, values={"scheme": "", "perplexity": value, "gap": 0.0, "minutes": 0.0})
    with tempfile.TemporaryDirectory() as scratch:
        tokens: dict[str, str] | None = None
        for preset, method in wanted:
            if method.library == OURS:
                values = ours(subject, preset, method, reference["perplexity"], args)
            else:
                tokens = tokens or hand_over(subject, Path(scratch), args)
                values = theirs(folder, tokens, preset, method, reference["perplexity"], args)
            table.add(name, preset, method.library, method.name, values={"scheme": method.scheme} | values)


def ours(subject: Subject, preset: str, method: Method, reference: float, args: argparse.Namespace) -> dict[str, Any]:
    values = subject.run("plain", subject.config(preset, args.seed, {"recipe": method.name}), reference)
    return {name: values[name] for name in ("perplexity", "gap", "minutes", "extras", "error")}


def hand_over(subject: Subject, scratch: Path, args: argparse.Namespace) -> dict[str, str]:
    """Write the token ids that every worker reads; the paths by name."""
    model, config = subject.load("plain"), subject.config("w4a8", args.seed, {})
    data = run_data(model, subject.tokenizer, config, config.resolve()).calibration
    ids = token_ids(model, subject.tokenizer, subject.evaluation)
    chunks = ids[: ids.numel() // args.seq_len * args.seq_len].view(-1, args.seq_len)
    paths = {}
    for name, array in (("calibration", torch.cat([data.train, data.validation])), ("evaluation", chunks)):
        paths[name] = str(scratch / f"{name}.npy")
        np.save(paths[name], array.numpy())
    return paths


def theirs(
    folder: Path, tokens: dict[str, str], preset: str, method: Method, reference: float, args: argparse.Namespace
) -> dict[str, Any]:
    """A row of another library; what keeps it from one is in ``error``."""
    python = environment(args.envs, method)
    weight_bits, activation_bits = PRESETS[preset]
    with tempfile.TemporaryDirectory() as scratch:
        job = tokens | {
            "model": str(folder.resolve()),
            "method": method.name,
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "seed": args.seed,
            "threads": torch.get_num_threads(),
            "scratch": scratch,
        }
        try:
            found = run_worker(python, method.worker, job, Path(scratch), 60 * args.limit)
        except WorkerError as error:
            return refused(str(error))
    return judged(found, reference, weight_bits)


def judged(found: dict[str, Any], reference: float, weight_bits: int) -> dict[str, Any]:
    """The values of a row, or why they say nothing."""
    seen = {name: found[name] for name in ("layers", "activations", "levels", "cpu_seconds", "versions")}
    if abs(found["float_perplexity"] - reference) > CLOSE:
        reason = f"the float model has perplexity {found['float_perplexity']:.5f} there, {reference:.5f} here"
        return refused(reason) | seen
    if found["levels"] > 2**weight_bits:
        return refused(f"a weight has {found['levels']} levels in an output channel") | seen
    if not math.isfinite(found["perplexity"]):
        return refused("the perplexity is not finite") | seen
    gap = found["perplexity"] / reference - 1
    values = {"perplexity": found["perplexity"], "gap": gap, "minutes": found["seconds"] / 60, "error": None}
    return values | seen


def refused(reason: str) -> dict[str, Any]:
    return {"perplexity": None, "gap": None, "minutes": None, "error": reason}


class WorkerError(Exception):
    """A worker gave no result."""


def run_worker(python: Path, worker: Path, job: dict[str, Any], scratch: Path, seconds: float) -> dict[str, Any]:
    """What a worker found. It is stopped, with all it started, when its time is up.

    Raises:
        WorkerError: it failed, or took too long.
    """
    request, answer, log = scratch / "job.json", scratch / "result.json", scratch / "log.txt"
    request.write_text(json.dumps(job), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [str(python), str(worker), str(request), str(answer)],
            cwd=scratch, env=inherited | offline, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise WorkerError(f"stopped after {seconds / 60:g} minutes") from None
        finally:
            if process.poll() is None:
                started = psutil.Process(process.pid).children(recursive=True)
                for one in [*started, process]:
                    one.kill()
                process.wait()
                psutil.wait_procs(started, timeout=10)  # not our children: they end when the system says so
    if status or not answer.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit status {status}"]
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise WorkerError(lines[-1])
    return json.loads(answer.read_text(encoding="utf-8"))


def environment(envs: Path, method: Method) -> Path:
    """The Python of the library's environment, made from its requirements if there is none for them yet.

    The requirements name every package, so that none of the dependencies is looked up: that would bring CUDA builds.
    """
    requirements = method.requirements
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    folder = envs.resolve() / method.library
    stamp, python = folder / "requirements.sha256", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    print(f"making an environment for {method.library}", file=sys.stderr, flush=True)
    started = time.monotonic()
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, "-r", str(requirements)]):
        if subprocess.run(command).returncode:
            raise SystemExit(f"no environment for {method.library}: {' '.join(command)} failed")
    stamp.write_text(digest)
    print(f"made in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return python


def cells(row: dict[str, Any]) -> list[str]:
    names = [*(row[name] for name in KEYS), row["scheme"]]
    return [*names, "refused", row["error"], ""] if row["perplexity"] is None else [*names, *cells_of_perplexity(row)]


def overview(rows: list[dict[str, Any]]) -> str:
    """Gaps of all methods, a column for each model; the smallest in each column of a preset is bold."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, float | None]] = {}
    for row in rows:
        if row["preset"] in PRESETS:
            key = (row["preset"].upper(), row["library"], row["method"], row["scheme"])
            lines.setdefault(key, {})[row["model"]] = row["gap"]
    gaps = [(key[0], model, gap) for key, line in lines.items() for model, gap in line.items() if gap is not None]
    best = {(preset, model): min(g for p, m, g in gaps if (p, m) == (preset, model)) for preset, model, _ in gaps}

    def shown(preset: str, model: str, line: dict[str, float | None]) -> str:
        if model not in line:
            return "—"
        if (gap := line[model]) is None:
            return "refused"
        return f"**{100 * gap:.2f} %**" if gap == best[preset, model] else f"{100 * gap:.2f} %"

    cells = [[*key, *(shown(key[0], model, line) for model in models)] for key, line in sorted(lines.items())]
    return markdown(("bits", *HEADER[2:5], *models), cells)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument(
        "--envs", type=Path, required=True, metavar="DIR", help="folder of the libraries' environments"
    )
    parser.add_argument("--limit", type=float, default=30.0, metavar="MINUTES", help="for each row of another library")
    parser.add_argument("--reuse", type=Path, metavar="FILE", help="results of ladder.py to take our own rows from")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="model/preset/library/method, with wildcards; repeatable"
    )
    args = checked(parser)
    args.wants = lambda *key: not args.only or any(fnmatch("/".join(key), pattern) for pattern in args.only)
    return args


if __name__ == "__main__":
    main()
