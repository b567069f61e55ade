"""``optimum-cli mobilequant``: the commands of ``mobilequant`` as a subcommand of optimum's own tool.

In the wheel this file becomes ``optimum/commands/register/register_mobilequant.py``, where ``optimum-cli`` looks for
``REGISTER_COMMANDS``. Hence the absolute imports. An editable install gets a copy, made when it is installed.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_mobilequant.cli import build_parser, run


class MobileQuantCommand(BaseOptimumCLICommand):
    """Adds the parser of :mod:`optimum_mobilequant.cli` under ``optimum-cli``."""

    COMMAND = CommandInfo(name="mobilequant", help="Integer-only quantization for phone NPUs.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        build_parser(parser)

    def run(self) -> None:
        sys.exit(run(self.args))


REGISTER_COMMANDS = [MobileQuantCommand]
