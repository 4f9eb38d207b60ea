"""The command line: finds the subcommand, runs it, turns errors into one line and an exit code.

It knows no HELM and no tensors; each subcommand lives in its own module of ``harness.commands``
and imports what is heavy only when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from engine.errors import TierbenchError, UsageError
from harness import config

COMMANDS = (
    "run", "plan", "profile", "throughput", "paper", "report", "compare", "baselines",
    "batch", "lm_eval", "curve", "calibrate", "store", "completion",
)  # fmt: skip
"""Modules of ``harness.commands``; each registers one subcommand."""

EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As the base class; flags that the command lacks are answered with the nearest that it has."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            raise UsageError(config.unknown_flags(self, args or (), rest))
        return found


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; its namespace carries the chosen one as ``execute``."""
    parser = _Parser(
        prog="run_helm.py",
        description="Evaluate language models that do not fit fast memory: HELM scenarios, measured "
        "accuracy and throughput per offloading policy. Without arguments the bundled demo is run.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="command", required=True)
    for name in COMMANDS:
        config.add_config_options(importlib.import_module(f"harness.commands.{name}").register(subparsers))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, the error's own code, or 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["run"]
    debug = "--debug" in arguments
    try:
        args = config.parse(build_parser, arguments)
        debug = args.debug
        if args.print_config:
            print(config.describe(config.commands_of(build_parser())[arguments[0]], args), end="")
            return 0
        return int(args.execute(args) or 0)
    except TierbenchError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("\ninterrupted: run the same command again to continue where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
