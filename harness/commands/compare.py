"""``run_helm.py compare``: the engine beside other systems, on the same requests, weights and memory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import UsageError
from harness.baselines import registry
from harness.commands.arguments import (
    add_chat,
    add_load_options,
    add_output_path,
    add_plugins,
    options_from_args,
)
from harness.commands.flags import COUNT, FOLDER, SWITCH, Group, add_flag, positive, several, some

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    who = parser.add_argument_group("model")
    add_flag(who, "--model", "a checkpoint in safetensors, local", FOLDER, required=True)
    add_flag(who, "--device", choices=("cpu", "cuda"), default="cpu")
    _add_systems(parser.add_argument_group("systems"))
    what = parser.add_argument_group("workload")
    add_load_options(what)
    entries = "HELM run entries on which accuracy is measured, too"
    add_flag(what, "-r --run-entries", entries, several("ENTRY"))
    add_flag(what, "-m --max-eval-instances", "per run entry", COUNT, 20)
    add_plugins(what)
    add_chat(what)
    add_flag(what, "--seed", "of the prompts", type=int, default=0)
    _add_memory(parser.add_argument_group("memory"))
    _add_measurement(parser.add_argument_group("measurement"))
    where = parser.add_argument_group("output")
    add_flag(where, "--output", "name of the comparison", default="default", type=some, metavar="NAME")
    add_output_path(where, "it goes to FOLDER/comparisons/NAME")
    work = "folder of derived weights and offloaded ones; default: OUTPUT/offload/comparisons"
    add_flag(where, "--work", work, FOLDER)
    add_flag(where, "--restart", "forget what was measured under this name", SWITCH)
    add_flag(where, "-d --dry-run", "only show what would be run", SWITCH)


def _add_systems(group: Group) -> None:
    systems = f"default: {','.join(SYSTEMS)}; known: {', '.join(registry.CLASSES)}"
    add_flag(group, "--systems", systems, several("NAME[/CONFIGURATION]"))
    settings = "settings that no probe changes; run_helm.py baselines explain NAME lists them"
    add_flag(group, "--set", settings, several("SYSTEM.KEY=VALUE"))
    add_flag(group, "--threads", "of every system; all unless given", COUNT, os.cpu_count() or 1)


def _add_memory(group: Group) -> None:
    add_flag(
        group, "--memory-cap", nargs="+", default=["none"], metavar="CAP",
        text="limits of RAM, page cache included: none, a part of the model's bytes (50%%), or a size",
    )  # fmt: skip
    caches = "empty the machine's whole page cache before each run, not only of the files that are read"
    add_flag(group, "--drop-caches", caches, SWITCH)


def _add_measurement(group: Group) -> None:
    add_flag(group, "--repeats", "", COUNT, 3)
    batch = several("[NAME[/CONFIGURATION]=]N")
    at_once = "sequences at once, of all systems or of one; default: searched for each"
    add_flag(group, "--batch", at_once, batch)
    first = "where the search begins: saves runs where small sizes only wait for the disk; default: 1"
    add_flag(group, "--first-batch", first, batch)
    add_flag(group, "--most-batch", "largest tried", COUNT, 64)
    add_flag(group, "--sample", "prompts whose tokens are compared with transformers'", COUNT, 2)
    add_flag(group, "--timeout", "seconds of one run", default=600, type=positive, metavar="S")


def execute(args: argparse.Namespace) -> int:
    """Compare, print the table; 1 if nothing at all could be measured."""
    from harness.comparison.runner import run_comparison

    options = make_options(args)
    if args.restart and not options.dry_run:
        (options.folder / "journal.jsonl").unlink(missing_ok=True)
    result = run_comparison(options)
    print(result.shown)
    if options.dry_run:
        return 0
    print(f"comparison: {result.folder}")
    return 0 if any(row["status"] == "ok" for row in result.rows) else 1


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
