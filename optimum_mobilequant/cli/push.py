"""``mobilequant push``."""

from __future__ import annotations

import argparse
import sys

from .common import FAILED_RUN, AddCommand


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("push", "Publish a quantized checkpoint on the Hugging Face Hub, with a model card.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by quantize")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the float model, where none is recorded")
    parser.add_argument("--license", metavar="L", help="such as apache-2.0; by default the base model's")
    parser.add_argument("--exports", nargs="+", default=[], metavar="DIR", help="folders written by export")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the list of files, send nothing")


def run_command(args: argparse.Namespace) -> int:
    from optimum_mobilequant.hub.push import CARD, prepare, push

    options = {"base_model": args.base_model, "license": args.license, "exports": args.exports}
    if args.dry_run:
        upload = prepare(args.checkpoint, args.repo_id, **options)
        card = str(upload.readme())
        print(f"{card.rstrip()}\n\nfiles for {args.repo_id}:")
        sizes = {path: file.stat().st_size for path, file in upload.files.items()} | {CARD: len(card.encode())}
        for path, size in sorted(sizes.items()):
            print(f"{size:>15,}  {path}")
        return 0
    try:
        url = push(args.checkpoint, args.repo_id, private=args.private, commit_message=args.message, **options)
    except ConnectionError as error:  # no fault of the input
        print(f"error: {error}", file=sys.stderr)
        return FAILED_RUN
    print(url)
    return 0
