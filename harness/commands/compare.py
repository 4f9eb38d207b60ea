"""``run_helm.py compare``: the engine beside other systems, on the same requests, weights and memory."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UsageError
from harness.baselines import registry
from harness.commands.arguments import (
    add_command,
    add_load_options,
    add_output_path,
    add_plugins,
    options_from_args,
    positive,
    some,
)  # fmt: skip

if TYPE_CHECKING:
    from harness.comparison.options import CompareOptions

SYSTEMS = ("ours", "accelerate", "transformers", "llama-cpp", "deepspeed", "airllm", "openvino")

DESCRIPTION = (
    "Run the same prompts through the engine and through other systems, each in a child process under the "
    "same limit of memory, one after the other in rotated order. Each gets its best variant and batch size "
    "by a bounded search. Writes a table as Parquet, CSV and Markdown. What is not installed or fails is a "
    "row that says why. A comparison that was interrupted continues when the same command is given again; "
    "failures are then tried again."
)

EPILOG = """\
examples:
  # what would be run, and what is not installed
  run_helm.py compare --model my-model --systems ours,accelerate,llama-cpp --dry-run

  # half of the model's bytes as RAM, and all of them
  run_helm.py compare --model my-model --systems ours,accelerate,llama-cpp --memory-cap 50% none --output half

  # one configuration each, settings of one's own, accuracy on a HELM run entry
  run_helm.py compare --model my-model --systems ours/4bit llama-cpp/q4_0 --set llama-cpp.repack=false \\
      --run-entries information_extraction --output four
"""


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "compare", "set the engine beside other systems under the same limit of memory",
        DESCRIPTION, EPILOG, execute,
    )  # fmt: skip
    _add_systems(parser)
    what = parser.add_argument_group("workload")
    add_load_options(what)
    what.add_argument(
        "-r", "--run-entries", nargs="+", action="extend", default=[], metavar="ENTRY",
        help="HELM run entries on which accuracy is measured, too",
    )  # fmt: skip
    what.add_argument(
        "-m", "--max-eval-instances", type=positive, default=20, metavar="N",
        help="per run entry (default: %(default)s)",
    )  # fmt: skip
    add_plugins(what)
    what.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    _add_measurement(parser)
    where = parser.add_argument_group("output")
    where.add_argument(
        "--output", type=some, default="default", metavar="NAME",
        help="name of the comparison (default: %(default)s)",
    )  # fmt: skip
    add_output_path(where, "it goes to FOLDER/comparisons/NAME; ")
    where.add_argument(
        "--work", type=Path, metavar="FOLDER",
        help="folder of derived weights and offloaded ones; default: OUTPUT/offload/comparisons",
    )  # fmt: skip
    where.add_argument("--restart", action="store_true", help="forget what was measured under this name")
    where.add_argument("-d", "--dry-run", action="store_true", help="only show what would be run")
    return parser


def _add_systems(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint in safetensors, local"
    )
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    group = parser.add_argument_group("systems")
    group.add_argument(
        "--systems", nargs="+", action="extend", default=[], metavar="NAME[/CONFIGURATION]",
        help=f"default: {','.join(SYSTEMS)}; known: {', '.join(registry.CLASSES)}",
    )  # fmt: skip
    group.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SYSTEM.KEY=VALUE",
        help="settings that no probe changes; run_helm.py baselines explain NAME lists them",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=positive, default=os.cpu_count() or 1, metavar="N",
        help="of every system (default: all, %(default)s)",
    )  # fmt: skip


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory-cap", nargs="+", default=["none"], metavar="CAP",
        help="limits of RAM, page cache included: none, a part of the model's bytes (50%%), or a size",
    )  # fmt: skip
    group.add_argument(
        "--drop-caches", action="store_true",
        help="empty the machine's whole page cache before each run, not only of the files that are read",
    )  # fmt: skip
    group = parser.add_argument_group("measurement")
    group.add_argument("--repeats", type=positive, default=3, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--batch", nargs="+", action="extend", default=[], metavar="[NAME[/CONFIGURATION]=]N",
        help="sequences at once, of all systems or of one; default: searched for each",
    )  # fmt: skip
    group.add_argument(
        "--first-batch", nargs="+", action="extend", default=[], metavar="[NAME[/CONFIGURATION]=]N",
        help="where the search begins: saves runs where small sizes only wait for the disk (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--most-batch", type=positive, default=64, metavar="N", help="largest tried (default: %(default)s)"
    )
    group.add_argument(
        "--sample", type=positive, default=2, metavar="N",
        help="prompts whose tokens are compared with transformers' (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=positive, default=600, metavar="S", help="seconds of one run (default: %(default)s)"
    )


def execute(args: argparse.Namespace) -> int:
    """Compare, print the table; 1 if nothing at all could be measured.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    from harness.comparison.runner import run_comparison

    signal.signal(signal.SIGTERM, _interrupt)
    options = make_options(args)
    if args.restart and not options.dry_run:
        (options.folder / "journal.jsonl").unlink(missing_ok=True)
    result = run_comparison(options)
    print(result.shown)
    if options.dry_run:
        return 0
    print(f"comparison: {result.folder}")
    return 0 if any(row["status"] == "ok" for row in result.rows) else 1


def _interrupt(*_: object) -> None:
    """A terminated comparison ends its child and removes its control group, as an interrupted one does."""
    raise KeyboardInterrupt


def read_batches(words: Sequence[str], flag: str = "--batch") -> dict[str, int]:
    """Batch sizes by system, ``""`` for all: ``8``, ``ours=32``, ``llama-cpp/q4_0=4``.

    Raises:
        UsageError: for an unknown system or what is no whole number above 0.
    """
    found = {}
    for word in (part for text in words for part in text.split(",")):
        name, _, count = word.rpartition("=")
        if not (count.isascii() and count.isdigit() and int(count)):
            raise UsageError(f"{flag} {word} gives no whole number above 0: write 8, or ours=8")
        if name:
            registry.chosen([name])
        found[name] = int(count)
    return found


def make_options(args: argparse.Namespace) -> CompareOptions:
    """Fill in what was not given.

    Raises:
        UsageError: for an unknown system or setting.
    """
    from harness.comparison.options import CompareOptions

    systems = args.systems or list(SYSTEMS)
    registry.chosen(systems)
    if not args.model.is_dir():
        raise UsageError(f"--model {args.model} is no folder: a comparison reads a local checkpoint")
    return options_from_args(
        CompareOptions,
        args,
        name=args.output,
        systems=systems,
        memory_caps=args.memory_cap,
        batches=read_batches(args.batch),
        first_batches=read_batches(args.first_batch, "--first-batch"),
        timeout_s=float(args.timeout),
        overrides=registry.overrides(args.set),
    )
