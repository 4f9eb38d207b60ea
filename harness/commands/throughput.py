"""``run_helm.py throughput``: the paper's synthetic load, measured beside what was predicted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UsageError
from harness.commands.arguments import (
    add_load_options,
    add_memory_group,
    add_policy_group,
    add_running_options,
    parse_policy,
    read_policies,
)
from harness.commands.flags import COUNT, FILE, add_flag, positive, some
from harness.engines.settings import settings_from_args

if TYPE_CHECKING:
    from harness.throughput.engines import Projection

DESCRIPTION = (
    "Equal prompts of random ids and a fixed number of tokens each, timed pass by pass: prefill, decode and "
    "generation throughput as the FlexGen paper counts them, each beside the prediction from this machine's "
    "profile (run_helm.py profile), and the peak of every tier beside the planned one. OPT from 125M to 175B "
    "ships as config data and needs no download with --random-weights. With --table the paper's tables are "
    "filled: cells that this machine can hold are run, the others are simulated on --profile."
)

EPILOG = """\
examples:
  # the smallest OPT with random weights, 32 sequences in one block
  run_helm.py throughput --model opt-125m --random-weights --prompt-len 128 --gen-len 16 \\
      --policy weights=host,kv=host,device_batch=8,num_device_batches=4

  # 30 billion parameters in 4 bits on the disk: 6 decode passes of 12 of its layers, projected
  run_helm.py throughput --model opt-30b --random-weights --prompt-len 512 --gen-len 32 --project 12/6 \\
      --policy weights=disk,kv=host,weight_quant=4,kv_quant=4,device_batch=4,num_device_batches=4

  # a table of the paper: what takes at most ten minutes here is run, the rest is simulated on a T4
  run_helm.py throughput --table throughput-512 --profile t4 --at-most 600
"""

TABLE_NAMES = (
    "throughput-256", "throughput-512", "throughput-1024", "throughput-128-128", "throughput-512-8",
)  # fmt: skip
OUTPUT = Path("results/throughput/throughput.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    what = parser.add_argument_group("workload")
    one = what.add_mutually_exclusive_group(required=True)
    add_flag(one, "--model", "one that ships as data, a folder or a hub name", type=some, metavar="NAME")
    add_flag(one, "--table", "all cells of a table; weights are random then", choices=TABLE_NAMES)
    add_load_options(what)
    add_flag(what, "--num-requests", "default: one block of the policy", COUNT)
    add_flag(what, "--repeats", "", COUNT, 1)
    add_flag(
        what, "--project", type=_projection, metavar="[LAYERS/]PASSES",
        text="run only this many decode passes, of only this many layers, and project the rest",
    )  # fmt: skip
    add_flag(what, "--seed", "of random weights", type=int, default=0)
    add_running_options(parser.add_argument_group("model"))
    add_policy_group(parser, default="auto")
    where = parser.add_argument_group("output")
    add_flag(
        where, "--profile", type=some, metavar="NAME_OR_FILE",
        text="this machine's profile, for the prediction; default: what run_helm.py profile wrote. For a "
        "table: the machine on which cells that are not run are simulated",
    )  # fmt: skip
    longer = "cells of a table that would take longer here are simulated"
    add_flag(where, "--at-most", longer, default=600, type=positive, metavar="SECONDS")
    add_flag(where, "-o --output", "JSON lines, appended to", FILE, OUTPUT)
    add_memory_group(parser)


def execute(args: argparse.Namespace) -> int:
    """Run the load, or fill the table."""
    from harness.environment import check_torchvision, require_memory_for

    require_memory_for("torch")
    check_torchvision()
    return _table(args) if args.table else _load(args)


def _load(args: argparse.Namespace) -> int:
    from harness.engines.auto import AUTO, is_auto
    from harness.progress.line import Progress
    from harness.throughput.engines import Maker, Projection, find_own_profile, run
    from harness.throughput.load import Load
    from harness.throughput.table import SEARCHED, planned_policy
    from harness.throughput.text import append, load_text, to_text

    profile = find_own_profile(args.device, Path(args.profile) if args.profile else None)
    maker = Maker(settings_from_args(args))
    policy = parse_policy(args.policy, read_policies(args.policy_file), args)
    if is_auto(policy):
        load = Load(args.prompt_len, args.gen_len, args.num_requests or SEARCHED)
        policy = planned_policy(maker, load, needed(profile), policy)
        print(f"policy {AUTO}: {policy.name}")
    load = Load(args.prompt_len, args.gen_len, args.num_requests or policy.block_size)
    progress = Progress()
    progress.begin(load_text(load), load.requests * args.repeats)
    projection = args.project or Projection()
    found = run(
        maker, policy, load, profile, projection, args.repeats,
        lambda state: progress.update(state.finished, eta_seconds=state.eta_seconds),
    )  # fmt: skip
    progress.end()
    weights = "random" if args.random_weights else "trained"
    name = None if profile is None else profile.name
    for measured in found:
        about = {"model": args.model, "weights": weights, "policy": policy.name, "profile": name}
        append(args.output, {**about, **measured.to_dict()})
        print(to_text(measured, weights, name))
    print(f"results: {args.output}")
    return 0


def _table(args: argparse.Namespace) -> int:
    from engine.planner import find_profile
    from harness.progress.line import Progress
    from harness.throughput.engines import Maker, Projection, find_own_profile
    from harness.throughput.table import TABLES, TableOptions, fill
    from harness.throughput.text import append, cells_text

    own = needed(find_own_profile(args.device))
    elsewhere = find_profile(args.profile) if args.profile else own
    options = TableOptions(
        args.policy, read_policies(args.policy_file), own, elsewhere,
        float(args.at_most), args.project or Projection(), args.num_requests,
    )  # fmt: skip

    def maker(model: str) -> Maker:
        return Maker(settings_from_args(args, model=model, random_weights=True))

    rows, progress = [], Progress()
    for row in fill(TABLES[args.table], options, maker):
        append(args.output, {"table": args.table, **row})
        progress.say(f"{row['model']}, {row['formats']}: {row['kind']}")
        rows.append(row)
    print(cells_text(rows))
    print(f"\n{args.table}: random weights; tokens per second. results: {args.output}")
    return 0


def needed(profile: Any) -> Any:
    """The profile, if there is one.

    Raises:
        UsageError: if there is none.
    """
    if profile is None:
        raise UsageError("there is no profile of this machine yet: run run_helm.py profile first")
    return profile


def _projection(text: str) -> Projection:
    from harness.throughput.engines import Projection

    try:
        return Projection.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PASSES or LAYERS/PASSES, whole numbers of at least 2 ({error})"
        ) from None
