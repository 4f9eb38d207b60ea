"""The command line: finds the subcommand, runs it, turns errors into one line and an exit code.

It knows no HELM and no tensors; each subcommand lives in its own module of ``harness.commands``
and imports what is heavy only when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from engine.errors import (
    DISK_FAILURES,
    OutOfMemoryError,
    StorageError,
    TierbenchError,
    UsageError,
    printable,
    storage_errors,
)
from engine.limits import memory_errors
from harness import config
from harness.signals import ending_signals, number_of

COMMANDS = {
    "run": "evaluate a model on HELM run entries under one or more policies",
    "plan": "find the fastest policy for a model, a machine and budgets",
    "models": "which model families work, and what one checkpoint is",
    "profile": "measure this machine, for plans and predictions",
    "throughput": "measure the paper's synthetic load beside its prediction",
    "paper": "the FlexGen paper's figures beside simulations",
    "report": "write the report of finished suites",
    "compare": "set the engine beside other systems under the same limit of memory",
    "baselines": "show, install and remove other systems to compare with",
    "batch": "answer a file of requests in OpenAI's batch format",
    "lm_eval": "evaluate tasks of lm-evaluation-harness (lm_eval)",
    "curve": "compare compression formats with full precision",
    "calibrate": "statistics of a model's activations, for w8a8",
    "store": "show, check and clear the store of packed weights",
    "completion": "print a script that completes commands and flags in a shell",
}
"""Modules of ``harness.commands``, one per subcommand, and what each does.

A module has ``DESCRIPTION`` and ``EPILOG`` (examples), ``add_arguments`` for its parser, ``execute``, which
returns the exit code and raises a `TierbenchError` for what a user can cause, and ``what_runs`` where the
defaults of some flags depend on others (see `harness.config.describe`).
"""

EXIT_SIGNAL = 128
"""Added to the number of the signal that ended a command, as shells do."""


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
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"harness.commands.{name}")
        command = subparsers.add_parser(
            name.replace("_", "-"),
            help=summary,
            description=textwrap.fill(module.DESCRIPTION, 100),
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(execute=module.execute, what_runs=getattr(module, "what_runs", None))
        module.add_arguments(command)
        config.add_config_options(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, the error's own code, or 128 and the number of the signal that ended it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["run"]
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):  # an ASCII locale shows what it lacks as \u00d7
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with ending_signals():
        try:
            args = config.parse(build_parser, arguments)
            debug = args.debug
            if args.print_config:
                print(config.describe(config.commands_of(build_parser())[arguments[0]], args), end="")
                return 0
            with memory_errors():
                return int(args.execute(args) or 0)
        except (TierbenchError, OSError) as error:
            ours = error if isinstance(error, TierbenchError) else _of_a_file(error)
            if debug or ours is None:
                raise
            _say(f"error: {printable(str(ours))}")
            if isinstance(ours, OutOfMemoryError):  # libraries fail once more in what they do at the exit
                sys.unraisablehook = lambda _: None
            return ours.exit_code
        except KeyboardInterrupt as interrupt:
            if debug:
                raise
            number = number_of(interrupt)
            how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            _say(f"\n{how}: run the same command again to continue where it stopped")
            return EXIT_SIGNAL + number


def _of_a_file(error: OSError) -> TierbenchError | None:
    """The same in words for a user, if a file or the disk is the reason: a library's own names no cure."""
    if error.errno is not None and error.filename is not None:
        try:
            with storage_errors(Path(os.fsdecode(error.filename))):
                raise error
        except TierbenchError as found:
            return found
    if error.errno in DISK_FAILURES:
        return StorageError(f"a file cannot be written ({error.strerror}): free space or check the disk")
    return None


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be what has gone
        print(line, file=sys.stderr)
