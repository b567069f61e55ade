"""``mobilequant eval`` and ``mobilequant lm-eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import AddCommand, check_model, load, positive, print_json, read_text


def register(add: AddCommand) -> None:
    """Add the commands to the parser."""
    parser = add("eval", "Measure perplexity and tasks of a float model or of a quantized checkpoint.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("model", metavar="MODEL_OR_CHECKPOINT", help="folder of a saved model, or a Hub id")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--seq-len", type=positive, default=256, metavar="N", help="tokens in a window (256)")
    parser.add_argument("--tasks", type=_names, default=[], metavar="A,B", help="tasks of lm-eval")
    parser.add_argument("--task-dir", metavar="DIR", help="folder with task YAMLs of yours")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--shots", type=int, metavar="N", help="examples in the prompt (each task's own number)")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="requests at a time (4)")
    parser.add_argument("--seed", type=int, default=0, help="of few-shot sampling (0)")
    parser.add_argument("--against", metavar="MODEL", help="measure this model, too, and show the difference")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin with the tokenizer's BOS token (text: no; tasks: auto)",
    )
    parser.add_argument("--no-record", action="store_true", help="do not store the scores in the checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")

    harness = add("lm-eval", "lm-eval's own command with this package imported, so that it can load checkpoints.")
    harness.set_defaults(run_command=run_harness)
    harness.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="passed on as they are")


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def run_command(args: argparse.Namespace) -> int:
    if args.text is None and not args.tasks:
        raise ValueError("nothing to measure: give --text FILE, --tasks NAMES, or both")
    names = {"model": check_model(args.model)} | ({"against": check_model(args.against)} if args.against else {})
    text = None if args.text is None else read_text(args.text)
    folder = None if args.task_dir is None else Path(args.task_dir).expanduser()
    if args.tasks:
        from optimum_mobilequant.evaluate.tasks import check_tasks

        check_tasks(args.tasks, folder)  # before any model is loaded
    measured = {role: _measure(name, args, text, folder) for role, name in names.items()}
    if not args.no_record:
        _record(Path(names["model"]), args, measured["model"])
    found = measured["model"] | ({"against": measured["against"]} if args.against else {})
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _measure(name: str, args: argparse.Namespace, text: str | None, folder: Path | None) -> dict[str, Any]:
    model, tokenizer = load(name, dtype="auto")
    values: dict[str, Any] = {}
    if text is not None:
        from optimum_mobilequant.evaluate.perplexity import perplexity

        result = perplexity(model, tokenizer, text, seq_len=args.seq_len, bos=bool(args.bos))
        values = {key: getattr(result, key) for key in ("perplexity", "word_perplexity", "tokens", "seconds")}
    if args.tasks:
        from optimum_mobilequant.evaluate.tasks import evaluate_tasks

        options = {name: getattr(args, name) for name in ("limit", "shots", "bos", "batch_size", "seed")}
        values["tasks"] = evaluate_tasks(model, tokenizer, args.tasks, folder=folder, **options).to_dict()
    return values


def _record(folder: Path, args: argparse.Namespace, values: dict[str, Any]) -> None:
    from optimum_mobilequant.checkpoint.record import is_checkpoint, record_evaluation
    from optimum_mobilequant.log import get_logger

    if not is_checkpoint(folder):
        return
    try:
        if "perplexity" in values:
            kept = {key: values[key] for key in ("perplexity", "word_perplexity", "tokens")}
            protocol = {"text": Path(args.text).name, "seq_len": args.seq_len, "bos": bool(args.bos)}
            record_evaluation(folder, f"text:{Path(args.text).name}", kept | protocol)
        if "tasks" in values:
            record_evaluation(folder, "tasks:" + ",".join(args.tasks), values["tasks"])
    except (OSError, ValueError) as error:  # a read-only folder must not cost the measurement
        get_logger(__name__).warning(f"the scores are not stored in {folder}: {error}")


def _print(found: dict[str, Any]) -> None:
    against = found.get("against", {})
    for key in ("perplexity", "word_perplexity", "tokens", "seconds"):
        if key in found:
            other = f"  {_shown(against[key])} (against)" if key in against else ""
            print(f"{key.replace('_', ' '):<18}{_shown(found[key])}{other}")
    if "tasks" not in found:
        return
    print(f"{'task':<28}{'metric':<20}{'value':>12}{'stderr':>10}" + (f"{'against':>12}" if against else ""))
    for task, metrics in found["tasks"]["scores"].items():
        for metric, value in metrics.items():
            error = found["tasks"]["errors"].get(task, {}).get(metric)
            other = against.get("tasks", {}).get("scores", {}).get(task, {}).get(metric)
            print(
                f"{task:<28}{metric:<20}{_shown(value):>12}{'-' if error is None else _shown(error):>10}"
                + ("" if other is None else f"{_shown(other):>12}")
            )


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, int) or value is None else format(value, ".6g")


def run_harness(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ImportError('lm-eval is missing: pip install "optimum-mobilequant[eval]"')
    from lm_eval.__main__ import cli_evaluate

    import optimum_mobilequant  # noqa: F401 (registers the method before lm-eval loads a model)

    kept, sys.argv = sys.argv, ["lm-eval", *args.arguments]  # lm-eval reads them there and nowhere else
    try:
        cli_evaluate()
    finally:
        sys.argv = kept
    return 0
