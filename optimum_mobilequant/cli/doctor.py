"""``mobilequant doctor``."""

from __future__ import annotations

import argparse

from .common import FAILED_RUN, AddCommand, print_json


def register(add: AddCommand) -> None:
    """Add the command to the parser."""
    parser = add("doctor", "Report versions, hardware and what works here; paste it into a bug report.")
    parser.set_defaults(run_command=run_command)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="also list which kernels would serve its layers",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_command(args: argparse.Namespace) -> int:
    from optimum_mobilequant.doctor import report, table

    found = report()
    layers = None
    if args.checkpoint is not None:
        from optimum_mobilequant.runtime.survey import survey, survey_table

        layers = survey(args.checkpoint)
        found["layers"] = [vars(layer) for layer in layers]
    if args.json:
        print_json(found)
    else:
        print(table(found))
        if layers is not None:
            print(f"\nkernels\n{survey_table(layers)}")
    return 0 if found["ok"] else FAILED_RUN
