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
    parser.add_argument("--shots", type=_count, metavar="N", help="examples in the prompt (each task's own number)")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="requests at a time (4)")
    parser.add_argument("--seed", type=int, default=0, help="of few-shot sampling (0)")
    parser.add_argument("--against", metavar="MODEL", help="measure this model, too; float: the base model")
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


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def run_command(args: argparse.Namespace) -> int:
    if args.text is None and not args.tasks:
        raise ValueError("nothing to measure: give --text FILE, --tasks NAMES, or both")
    names = {"model": check_model(args.model)}
    if args.against:
        names["against"] = check_model(_against(args.against, Path(names["model"])))
    text = None if args.text is None else read_text(args.text)
    tasks = None
    if args.tasks:
        from optimum_mobilequant.evaluate.tasks import load_tasks

        folder = None if args.task_dir is None else Path(args.task_dir).expanduser()
        tasks = load_tasks(args.tasks, folder)  # before any model is loaded
    measured = {role: _measure(name, args, text, tasks) for role, name in names.items()}
    if not args.no_record:
        _record(Path(names["model"]), args, measured, names.get("against"))
    found = measured["model"] | ({"against": measured["against"]} if args.against else {})
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _against(name: str, checkpoint: Path) -> str:
    """The model to compare with; "float" stands for the one the checkpoint was made from."""
    if name != "float" or Path(name).exists():
        return name
    from optimum_mobilequant.checkpoint.record import recorded_base

    base = recorded_base(checkpoint)
    if base is None:
        raise ValueError(
            f"{checkpoint} does not record its float model (only models loaded by a Hub id are): give --against the "
            "folder or id of that model"
        )
    return base


def _measure(name: str, args: argparse.Namespace, text: str | None, tasks: Any) -> dict[str, Any]:
    model, tokenizer = load(name, dtype="auto")
    values: dict[str, Any] = {}
    if text is not None:
        from optimum_mobilequant.evaluate.perplexity import perplexity

        result = perplexity(model, tokenizer, text, seq_len=args.seq_len, bos=bool(args.bos))
        values = {key: getattr(result, key) for key in ("perplexity", "word_perplexity", "tokens", "seconds")}
    if tasks is not None:
        from optimum_mobilequant.evaluate.tasks import evaluate_tasks

        options = {name: getattr(args, name) for name in ("limit", "shots", "bos", "batch_size", "seed")}
        values["tasks"] = evaluate_tasks(model, tokenizer, tasks, **options).to_dict()
    return values


def _record(folder: Path, args: argparse.Namespace, measured: dict[str, dict[str, Any]], against: str | None) -> None:
    from optimum_mobilequant.checkpoint.record import is_checkpoint, record_evaluation
    from optimum_mobilequant.log import get_logger

    if not is_checkpoint(folder):
        return
    values, other = measured["model"], measured.get("against", {})
    beside = {} if against is None else {"model": Path(against).name if Path(against).exists() else against}
    try:
        if "perplexity" in values:
            keys = ("perplexity", "word_perplexity", "tokens")
            kept = {key: values[key] for key in keys}
            protocol = {"text": Path(args.text).name, "seq_len": args.seq_len, "bos": bool(args.bos)}
            if beside:
                kept["against"] = beside | {key: other[key] for key in keys}
            record_evaluation(folder, f"text:{Path(args.text).name}", kept | protocol)
        if "tasks" in values:
            kept = dict(values["tasks"])
            if beside:
                kept["against"] = beside | {key: other["tasks"][key] for key in ("scores", "errors")}
            record_evaluation(folder, "tasks:" + ",".join(args.tasks), kept)
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
    print(f"{'task':<27} {'metric':<19} {'value':>12}{'stderr':>13}" + (f"{'against':>13}" if against else ""))
    for task, metrics in found["tasks"]["scores"].items():
        for metric, value in metrics.items():
            error = found["tasks"]["errors"].get(task, {}).get(metric)
            other = against.get("tasks", {}).get("scores", {}).get(task, {}).get(metric)
            print(
                f"{task:<27} {metric:<19} {_shown(value):>12}{'-' if error is None else _shown(error):>13}"
                + ("" if other is None else f"{_shown(other):>13}")
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
