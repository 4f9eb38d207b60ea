"""``run_helm.py plan``: the fastest policy for a model, a machine and budgets, and why others lose."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UsageError
from harness.commands.arguments import add_budgets, add_entry_options, add_load_options, options_from_args
from harness.commands.flags import COUNT, SWITCH, add_flag, number, some
from harness.engines.auto import PROFILES
from harness.engines.settings import settings_from_args

if TYPE_CHECKING:
    from engine.spec.profile import HardwareProfile
    from engine.spec.request import Request

DESCRIPTION = (
    "Find the policy with the highest generation throughput: where weights, KV cache and hidden states "
    "live, how large the block is, how many bits, and where decoding attends. Blocks and formats are "
    "enumerated, a linear program finds the fractions, and what it finds is rounded to whole tensors and "
    "sequences, held against the engine's own memory plan and simulated on the machine's profile. Nothing "
    "is loaded; every figure is simulated."
)

EPILOG = """\
examples:
  # OPT-175B on the paper's machine, at most 4 bits, nothing on disk
  run_helm.py plan --model opt-175b --profile t4 --prompt-len 512 --gen-len 32 --num-requests 96 \\
      --accuracy 4bit --no-disk

  # OPT-30B within 12 GiB of device and 100 GiB of host memory, a block in at most ten minutes, as JSON
  run_helm.py plan --model opt-30b --profile t4 --device-memory 12GiB --host-memory 100GiB \\
      --num-requests 64 --block-seconds 600 --json

  # what a run entry really asks of a model in a folder, on an H200
  run_helm.py plan --model scenarios/demo/model --profile h200 -r information_extraction -m 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    what = parser.add_argument_group("workload: run entries, or requests of one length")
    add_entry_options(what, None)
    add_load_options(what)
    add_flag(what, "--num-requests", "", COUNT, 256)
    add_flag(what, "--expected-len", "mean tokens of an answer before it ends; default: the maximum", COUNT)
    who = parser.add_argument_group("model")
    add_flag(
        who, "--model", type=some, required=True, metavar="NAME_OR_FOLDER",
        text="opt-125m to opt-175b, or a local folder or hub name, of which the config is read",
    )  # fmt: skip
    add_flag(
        who, "--profile", type=some, metavar="NAME_OR_FILE",
        text="machine: t4, rtx3090, a6000, h200, or a file that profile wrote; default: this one's in "
        f"{PROFILES}",
    )  # fmt: skip
    add_flag(who, "--device", "of this machine's profile: auto, cpu, cuda, cuda:N", default="auto")
    add_flag(who, "--trust-remote-code", "run code that comes with the model", SWITCH)
    add_budgets(parser, default="all that the profile has")
    constraints = parser.add_argument_group("constraints")
    bits = "fewest bits that weights and KV cache may be compressed to"
    add_flag(constraints, "--accuracy", bits, choices=("exact", "8bit", "4bit"), default="exact")
    add_flag(constraints, "--no-compression", "the same as --accuracy exact", SWITCH)
    add_flag(constraints, "--no-disk", "place nothing on disk", SWITCH)
    seconds = number(lambda value: 0 < value < math.inf, "a number of seconds above 0")
    add_flag(constraints, "--block-seconds", "maximum seconds of a block", type=seconds, metavar="S")
    add_flag(parser, "--json", "print the plan as JSON", SWITCH)


def execute(args: argparse.Namespace) -> int:
    """Plan and print."""
    from engine.planner import Compression, Constraints, Workload, make_plan, spec_for
    from harness.throughput.plan_text import to_text

    profile = _profile(args)
    if args.run_entries or args.conf_paths:
        asked = _requests(args)
        requests = Workload.of(
            asked, expected=[args.expected_len] * len(asked) if args.expected_len else None
        )
    else:
        requests = Workload.uniform(args.prompt_len, args.gen_len, args.num_requests, args.expected_len)
    accuracy = Compression.EXACT if args.no_compression else Compression(args.accuracy)
    plan = make_plan(
        profile,
        spec_for(args.model, profile, args.trust_remote_code),
        requests,
        Constraints(
            accuracy,
            disk=not args.no_disk,
            block_seconds=args.block_seconds,
            budgets=settings_from_args(args).budgets,
        ),
    )
    print(json.dumps(plan.to_dict(), indent=1) if args.json else to_text(plan))
    return 0


def _requests(args: argparse.Namespace) -> list[Request]:
    """What the run entries ask of the model; HELM's files go to a folder that is removed."""
    from harness.suite.options import SuiteOptions
    from harness.suite.requests import requests_of

    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        options = options_from_args(
            SuiteOptions,
            args,
            settings=settings_from_args(
                args, device="auto", random_weights=True, offload_dir=folder / "offload",
                device_memory=None, host_memory=None, disk=None,
            ),
            model_name="planned",
            policies=[],
            suite="plan",
            output_path=folder,
            local_path=folder / "prod_env",
        )  # fmt: skip
        return requests_of(options)


def _profile(args: argparse.Namespace) -> HardwareProfile:
    """The machine that is asked for, else this one's newest measured profile.

    Raises:
        UsageError: if none is given and this machine was never measured.
    """
    from engine.planner import find_profile, own_profile, profile_names

    if args.profile:
        return find_profile(args.profile)
    profile = own_profile(PROFILES, args.device)
    if profile is None:
        raise UsageError(
            f"{PROFILES} holds no profile of this machine: measure it with run_helm.py profile, or give "
            f"--profile with one of {', '.join(profile_names())} or a file"
        )
    print(f"profile of this machine: {profile.name}", file=sys.stderr)
    return profile
