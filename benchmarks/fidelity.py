"""How far the arithmetics of one checkpoint are apart: float, simulation, integers, ONNX Runtime, HTP emulator.

    python benchmarks/fidelity.py --out fidelity.json
    python benchmarks/fidelity.py --out fidelity.json --append --models DIR \\
        --text NAME=calibration.txt,evaluation.txt,150000

Quantizes the embedded demo model and every model folder in DIR to W8A8 and W4A8, exports each to ONNX, and runs
``compare`` on held-out text, with the simulation in float32 as one more arithmetic. A row is one
checkpoint: the perplexity of each arithmetic; of each pair the SQNR of the logits and the share of positions with the
same most likely token; and for each kind of operation, fed with a simulation's codes, how many codes of the integer
executor differ from that simulation's result. ONNX Runtime and the emulator take part where their packages are
installed; otherwise the row says why they are absent. Rows are written as they are measured; with --append, rows that
the file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quality import EMBEDDED, Text, text_argument
from table import cpu_name
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mobilequant import MobileQuantConfig, quantize
from optimum_mobilequant.evaluate.compare import compare
from optimum_mobilequant.evaluate.perplexity import token_ids
from optimum_mobilequant.graph.exact import ExactSimulation
from optimum_mobilequant.graph.executor import IntegerExecutor
from optimum_mobilequant.graph.simulation import operation_differences, simulated_codes
from optimum_mobilequant.run.prepare import versions

PRESETS = ("w8a8", "w4a8")
RUNTIMES = ("onnx", "onnxruntime", "onnxruntime-qnn")


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folders = [EMBEDDED, *(sorted(args.models.iterdir()) if args.models else [])]
    models = {path.name: path for path in folders if (path / "config.json").is_file()}
    if unknown := args.text.keys() - models.keys():
        raise SystemExit(f"--text names no model here: {', '.join(unknown)}; models: {', '.join(models)}")
    settings = {name: getattr(args, name) for name in ("recipe", "effort", "seed", "seq_len", "tokens", "quick")}
    table = Table(args.out, settings, append=args.append)
    for name, folder in models.items():
        text = args.text.get(name, Text("python-stdlib", "python-stdlib", args.max_chars))
        for preset in PRESETS:
            if (not args.only or f"{name}/{preset}" in args.only) and not table.has(name, preset):
                table.add(
                    {"model": name, "preset": preset, "text": text.record()} | measure(folder, preset, text, args)
                )
    print(table.markdown())


def measure(folder: Path, preset: str, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize, save, export and compare one model."""
    with tempfile.TemporaryDirectory(prefix="fidelity-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        save_checkpoint(folder, checkpoint, preset, text, args)
        absent: dict[str, str] = {}
        onnx = exported(checkpoint, Path(scratch) / "onnx", args.seq_len, absent)
        htp = emulated(checkpoint, absent)
        found = compare(
            checkpoint, text.read(), float32=True, onnx=onnx, onnx_float64=onnx is not None,
            htp=htp, float_model=str(folder), seq_len=args.seq_len,
            tokens=args.tokens, progress=False,
        ).to_dict()  # fmt: skip
        operations = operation_shares(checkpoint, text, args)
    pairs = found.pop("pairs")
    return {"runners": found, "pairs": pairs, "operations": operations, "absent": absent}


def operation_shares(checkpoint: Path, text: Text, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each kind of operation of the integer executor, fed with the codes of a simulation: codes that differ from the
    simulation's result, and the largest difference. On four windows of the text."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = token_ids(model, tokenizer, text.read())
    ids = ids[: min(4, len(ids) // args.seq_len) * args.seq_len].view(-1, args.seq_len)
    executor = IntegerExecutor.of(model, positions=args.seq_len)
    found: dict[str, dict[str, Any]] = {}
    sources = (
        ("float32", simulated_codes(model, executor, ids)),
        ("simulate", ExactSimulation(model, executor).codes(ids)),
    )
    for name, codes in sources:
        total = found.setdefault(name, {})
        for output, difference in operation_differences(executor, codes).items():
            producer = executor.graph.producer(output)
            kind = total.setdefault(producer.kind, {"codes": 0, "different": 0, "largest": 0})
            kind["codes"] += difference.codes
            kind["different"] += difference.different
            kind["largest"] = max(kind["largest"], difference.largest)
    return found


def save_checkpoint(folder: Path, checkpoint: Path, preset: str, text: Text, args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"dataset": text.calibration, "bos": False, "seq_len": args.seq_len, "seed": args.seed}
    if args.quick:
        options |= {"samples": 8}
    config = MobileQuantConfig(preset, recipe=args.recipe, effort=args.effort, **options)
    quantize(model, tokenizer, config).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def exported(checkpoint: Path, out: Path, context: int, absent: dict[str, str]) -> Path | None:
    """The export to ONNX, or None with the reason in ``absent``."""
    from optimum_mobilequant.exporters import export

    try:
        export(checkpoint, "onnx", out, context=context)
        import onnxruntime  # noqa: F401 (running needs it, writing does not)
    except ImportError as error:
        absent["onnx"] = str(error)
        return None
    return out


def emulated(checkpoint: Path, absent: dict[str, str]) -> bool:
    """Whether the emulator is here and takes this checkpoint; else the reason is in ``absent``."""
    try:
        from optimum_mobilequant.exporters.htp import HtpRunner

        HtpRunner(checkpoint, context=4, prompt_length=2)
    except (ImportError, RuntimeError, ValueError) as error:
        absent["htp"] = str(error)
        return False
    return True


class Table:
    """The JSON file and its rows; each row knows the run (versions, machine, date) that measured it."""

    def __init__(self, path: Path, settings: dict[str, Any], *, append: bool):
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            if not append:
                raise SystemExit(f"{path} exists: give another --out, or --append to add the missing rows")
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] != settings:
                raise SystemExit(f"{path} was measured with {stored['settings']}, not {settings}: give another --out")
            self.rows, self.runs = stored["rows"], stored["runs"]
        self.runs.append(
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
                "versions": versions() | dict(runtime_versions()),
            }
        )

    def has(self, model: str, preset: str) -> bool:
        return any((row["model"], row["preset"]) == (model, preset) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(finite(row) | {"run": len(self.runs) - 1})
        content = {"settings": self.settings, "runs": self.runs, "rows": self.rows}
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        print(f"{row['model']}  {row['preset']}  {', '.join(row['runners'])}", flush=True)

    def markdown(self) -> str:
        """One table of perplexities, one of pairs (SQNR in dB and equal most likely tokens)."""
        return "\n\n".join(
            self._markdown(part, cell)
            for part, cell in (
                ("runners", lambda v: f"{v['perplexity']:.4f}"),
                ("pairs", lambda v: f"{_decibels(v['sqnr_db'])}, {100 * v['argmax']:.2f} %"),
            )
        )

    def _markdown(self, part: str, cell: Any) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row[part]))
        lines = [f"| {' | '.join(['model', 'preset', *names])} |", "|---" * (len(names) + 2) + "|"]
        for row in self.rows:
            cells = [cell(row[part][name]) if name in row[part] else "—" for name in names]
            lines.append(f"| {' | '.join([row['model'], row['preset'], *cells])} |")
        return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def finite(value: Any) -> Any:
    """JSON has no infinity: the SQNR of equal logits becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def runtime_versions() -> Iterator[tuple[str, str]]:
    for package in RUNTIMES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the rows")
    parser.add_argument("--append", action="store_true", help="continue that file: measure what it lacks")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of model folders, measured as well")
    parser.add_argument(
        "--text", type=text_argument, action="append", default=[], metavar="NAME=CALIBRATION,EVALUATION,CHARS"
    )
    parser.add_argument("--max-chars", type=int, default=200_000, help="of the default evaluation text")
    parser.add_argument("--only", action="append", metavar="MODEL/PRESET", help="measure only this row; repeatable")
    parser.add_argument("--recipe", default="mobilequant")
    parser.add_argument("--effort", default="light")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=256, help="of the windows, and context of the exports")
    parser.add_argument("--tokens", type=int, default=4096, help="of the evaluation text")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="calibrate on 8 sequences: does it run at all?")
    args = parser.parse_args()
    args.text = dict(args.text)
    return args


if __name__ == "__main__":
    main()
