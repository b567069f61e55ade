"""Speed, memory and loss of tuning: this checkout, and others beside it.

    python benchmarks/tuning_speed.py --out tuning_speed.json
    python benchmarks/tuning_speed.py --baseline first=PATH --baseline main=PATH --out tuning_speed.json

Each contender is a process of its own that runs the public ``quantize`` of its checkout (a folder that holds the
package, e.g. made by ``git worktree add PATH COMMIT``). They take turns, one optimizer step at a time and only one at
once, so that a busy machine slows all of them alike. Between two turns lies everything a run does for a step:
targets, forward and backward pass, optimizer, and the validations, which are part of the whole but not of the median.
Steps of the first epoch compute the teacher's targets. Peaks are of the whole process, above its size after imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THIS = "this"


def worker(args: argparse.Namespace) -> None:
    """One run of ``quantize`` that waits for its turn before each step; prints JSON for each and last."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from optimum_mobilequant import MobileQuantConfig, quantize

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    before, shares = peak(), {"fake": 0.0}
    marks = [(0.0, 0.0)]

    def turn(*_: Any) -> None:
        wall, cpu = time.perf_counter() - marks[-1][0], time.process_time() - marks[-1][1]
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)
        sys.stdin.readline()
        marks.append((time.perf_counter(), time.process_time()))

    register_optimizer_step_post_hook(turn)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    sizes = {"samples": args.samples, "seq_len": args.length, "batch_size": args.batch, "seed": args.seed}
    sizes |= {"recipe": "mobilequant", "steps": args.steps}
    config = MobileQuantConfig(args.preset, dataset="python-stdlib", bos=False, **sizes)
    profiler = torch.profiler.profile() if args.profile else None
    if profiler:
        profiler.start()
    quantize(model, AutoTokenizer.from_pretrained(args.model), config)
    if profiler:
        profiler.stop()
        shares = shares_of(profiler)
    recorded = model.config.quantization_config.recorded
    values = {"perplexity": recorded["validation_perplexity"]["quantized"], "history": recorded["history"]}
    print(json.dumps({"end": True, "peak_bytes": peak() - before, "shares": shares, **values}), flush=True)


def shares_of(profiler: Any) -> dict[str, float]:
    """Share of the profiled time inside fake quantization (forward and backward) and inside matrix products."""
    events = profiler.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)

    def inside(names: tuple[str, ...], total: bool) -> float:
        own = [e for e in events if e.key.startswith(names)]
        return sum(e.cpu_time_total if total else e.self_cpu_time_total for e in own) / whole

    return {
        "fake quantization": inside(("_FakeQuantize",), total=True),
        "matrix products": inside(("aten::mm", "aten::bmm", "aten::addmm", "mkldnn::_linear"), total=False),
    }


def peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


class Contender:
    """A worker process and what it said."""

    def __init__(self, name: str, checkout: Path, args: argparse.Namespace):
        self.name = name
        self.steps: list[dict[str, float]] = []
        self.end: dict[str, Any] = {}
        if not (checkout / "optimum_mobilequant").is_dir():
            raise SystemExit(f"{checkout} holds no package optimum_mobilequant; give a checkout")
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(args.threads)}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._listen()  # runs up to the end of its first step

    def step(self) -> None:
        """Let it go on to the end of the next step, or to its end."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._listen()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                if "end" in said:
                    self.end = said
                else:
                    self.steps.append(said)
                return
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}")

    def result(self, args: argparse.Namespace) -> dict[str, Any]:
        """Without the first step, which includes loading and calibration."""
        tokens = args.batch * args.length
        found: dict[str, Any] = {}
        for clock in ("wall", "cpu"):
            seconds = [step[clock] for step in self.steps[1:]]
            found[f"median_step_{clock}_s"] = statistics.median(seconds)
            found[f"tokens_per_{clock}_s"] = tokens / statistics.mean(seconds)
        return found | {key: value for key, value in self.end.items() if key != "end"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "demo_model"), help="folder of a float model")
    parser.add_argument("--preset", default="w4a8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--samples", type=int, default=40, help="with the default steps: five passes, as in a usual run"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--baseline", action="append", default=[], metavar="NAME=PATH", help="another checkout")
    parser.add_argument("--profile", action="store_true", help="shares of time by kind (slows all contenders)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    if args.worker:
        worker(args)
        return
    from table import cpu_name

    folders = {THIS: ROOT} | {
        name: Path(path).resolve() for name, _, path in (b.partition("=") for b in args.baseline)
    }
    load_before = os.getloadavg()
    contenders = [Contender(name, path, args) for name, path in folders.items()]
    for _ in range(args.steps):
        for contender in contenders:
            contender.step()
    results = {c.name: c.result(args) for c in contenders}
    for name, row in results.items():
        for clock in ("wall", "cpu"):
            row[f"{clock}_speed_of_this"] = row[f"median_step_{clock}_s"] / results[THIS][f"median_step_{clock}_s"]
        print(name, {k: v for k, v in row.items() if k != "history"})
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_average": [load_before[0], os.getloadavg()[0]],
        **{name: getattr(args, name) for name in ("preset", "batch", "length", "samples", "steps", "seed", "threads")},
        "model": Path(args.model).name,
        "contenders": results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
