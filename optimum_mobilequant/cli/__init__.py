"""The ``mobilequant`` command. One module for each subcommand; adding one is adding a row to ``COMMANDS``.

The same parser serves ``optimum-cli mobilequant``. Torch and transformers are imported inside the run functions only,
so help and usage errors come at once. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from . import bench, compare, doctor, evaluate, export, inspect, ladder, listing, push, quantize, report
from .common import BAD_INPUT, FAILED_RUN

# In the order of the help page.
COMMANDS = (quantize, evaluate, ladder, compare, bench, inspect, report, export, push, listing, doctor)


def build_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """Adds the commands to ``parser``, or to a new parser named ``mobilequant``; returns it."""
    if parser is None:
        parser = argparse.ArgumentParser("mobilequant", description="Integer-only quantization for phone NPUs.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show Python's whole traceback")
    commands = parser.add_subparsers(title="commands", dest="mobilequant_command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        # Abbreviated options would change their meaning when a new option is added.
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    for command in COMMANDS:
        command.register(add)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs a parsed command.

    Returns:
        The exit code: 0, 1 (the run failed, or doctor found a fault), 2 (bad input), 130 (interrupted).
    """
    try:
        code: int = args.run_command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `mobilequant inspect ... | head` closed the pipe: no fault of the input
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        resumes = getattr(args, "run_dir", None) or getattr(args, "to", None) == "ai-hub"
        hint = ": the same command resumes" if resumes else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if args.traceback:
            traceback.print_exc()
        # Some libraries raise texts of several lines; a script that reads stderr gets one line.
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (RuntimeError, FloatingPointError)):  # the run failed: diverged, out of memory, ...
            print(f"error: {message} (--traceback shows where)", file=sys.stderr)
            return FAILED_RUN
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``mobilequant``; returns the exit code."""
    return run(build_parser().parse_args(argv))
