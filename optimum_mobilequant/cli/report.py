"""``mobilequant report``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from .common import AddCommand, finite, positive, read_text

FORMATS = ("html", "md", "json")


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("report", "One page about a checkpoint or a run: scores, sizes, learning, errors of sites, settings.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a checkpoint, or the run directory of any run")
    parser.add_argument("--out", metavar="FILE", help="where to write (default: to the terminal)")
    parser.add_argument("--format", choices=FORMATS, help="html, md or json (default: by the name of --out, else md)")
    parser.add_argument("--run-dir", metavar="DIR", help="run directory of the checkpoint: ranges, learned parameters")
    parser.add_argument(
        "--ladder", metavar="FILE", help="results of `mobilequant ladder --json` (default: ladder.json in the folder)"
    )
    parser.add_argument("--text", metavar="FILE", help="measure the error of every activation on this text")
    parser.add_argument("--seq-len", type=positive, default=128, metavar="N", help="tokens in a window (128)")
    parser.add_argument(
        "--tokens", type=positive, default=1024, metavar="N", help="tokens of the text that are read (1024)"
    )
    parser.add_argument("--site", metavar="NAME", help="activation whose distribution is shown first (the worst)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file in --out")


def run_command(args: argparse.Namespace) -> int:
    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None and out.exists() and not (args.overwrite and out.is_file()):
        raise ValueError(f"{out} exists: give another --out, or --overwrite to replace the file")
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"no folder {str(out.parent)!r}: make it, or give another --out")
    if args.site is not None and args.text is None:
        raise ValueError("--site shows a distribution that is measured: give --text FILE, too")
    text = None if args.text is None else read_text(args.text)

    from optimum_mobilequant.report import collect_report, to_html, to_markdown

    suffix = out.suffix.lstrip(".").lower() if out is not None else ""
    form = args.format or {"html": "html", "htm": "html", "json": "json"}.get(suffix, "md")
    report = collect_report(
        args.path,
        run_dir=args.run_dir,
        ladder=args.ladder,
        text=text,
        seq_len=args.seq_len,
        tokens=args.tokens,
        histogram=args.site,
        command=shlex.join(["mobilequant", *sys.argv[1:]]),
    )
    if form == "json":
        page = json.dumps(finite(report.to_dict()), indent=2, allow_nan=False) + "\n"
    else:
        page = to_html(report) if form == "html" else to_markdown(report)
    if out is None:
        sys.stdout.write(page)
        return 0
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{out}  ({len(page.encode()) / 1000:.0f} kB)")
    return 0
