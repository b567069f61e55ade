"""``mobilequant inspect``."""

from __future__ import annotations

import argparse

from .common import AddCommand, print_json


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("inspect", "List the tensors of a quantized checkpoint without loading the model.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder written by quantize")
    parser.add_argument("--json", action="store_true", help="print JSON; a value that is not finite becomes null")


def run_command(args: argparse.Namespace) -> int:
    from optimum_mobilequant.checkpoint.inspection import inspect_checkpoint

    listing = inspect_checkpoint(args.checkpoint)
    if args.json:
        print_json(listing.to_dict())
    else:
        print(listing.table())
    return 0
