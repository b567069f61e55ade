"""``mobilequant doctor``."""

from __future__ import annotations

import argparse

from .common import FAILED_RUN, AddCommand, print_json


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("doctor", "Report versions, hardware and what works here; paste it into a bug report.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_command(args: argparse.Namespace) -> int:
    from optimum_mobilequant.doctor import report, table

    found = report()
    if args.json:
        print_json(found)
    else:
        print(table(found))
    return 0 if found["ok"] else FAILED_RUN
