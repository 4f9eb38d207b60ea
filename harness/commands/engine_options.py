"""Who answers: the model, policy, device and memory flags of the doors, and the engine they describe.

It knows the command line and the engine's constructor, and nothing of what will be asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UsageError
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.units import parse_bytes
from harness.commands.run import POLICY_FILE, read_policies

if TYPE_CHECKING:
    from engine.engine import Engine
    from harness.text import Text


def add_engine_options(parser: argparse.ArgumentParser, *model_flags: str) -> None:
    """Add the flags that say who answers.

    Args:
        model_flags: further names of ``--model``, such as ``-M``.
    """
    who = parser.add_argument_group("who answers")
    who.add_argument(
        "--model", *model_flags, required=True, metavar="FOLDER_OR_NAME", help="local folder or hub name"
    )
    who.add_argument(
        "--policy", default="resident", metavar="POLICY",
        help="a name from the policy file, or key=value,...; default: %(default)s",
    )  # fmt: skip
    who.add_argument(
        "--policy-file", type=Path, default=POLICY_FILE, metavar="FILE", help="default: %(default)s"
    )
    who.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or pretend (default: %(default)s)"
    )
    who.add_argument("--random-weights", action="store_true", help="make up the weights: throughput only")
    who.add_argument(
        "--trust-remote-code", "--trust_remote_code", action="store_true",
        help="run code that comes with the model",
    )  # fmt: skip
    budget = parser.add_argument_group("memory (sizes such as 16GiB; default: all that is free)")
    budget.add_argument("--device-memory", type=size, metavar="SIZE", help="most bytes of the device tier")
    budget.add_argument("--host-memory", type=size, metavar="SIZE", help="most bytes of the host tier")
    budget.add_argument("--disk", type=size, metavar="SIZE", help="most bytes of the disk tier")
    budget.add_argument(
        "--offload-dir", type=Path, metavar="FOLDER", help="of the disk tier; default: results/offload"
    )


def make_engine(args: argparse.Namespace, seed: int) -> tuple[Engine, Text]:
    """The engine and the tokenizer that the flags describe; weights are not loaded yet.

    Args:
        seed: of random weights.

    Raises:
        UsageError: for a model, policy, device or folder that cannot be used.
    """
    policy = Policy.parse(args.policy, read_policies(args.policy_file))
    from harness.environment import check_torchvision

    check_torchvision()
    from engine.engine import Engine
    from harness.text import Text

    engine = Engine(
        args.model,
        policy,
        budgets=Budgets(args.device_memory, args.host_memory, args.disk),
        offload_dir=args.offload_dir,
        device=args.device,
        weights="random" if args.random_weights else "trained",
        seed=seed,
        trust_remote_code=args.trust_remote_code,
    )
    try:
        return engine, Text.load(args.model, args.trust_remote_code)
    except UsageError:
        engine.close()
        raise


def size(text: str) -> int:
    """A flag's size in bytes."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
