"""Who answers: the model, policy, device and memory flags of all doors, and the engine they describe.

It knows the command line and the engine's constructor, and nothing of what will be asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine.errors import PolicyError, UsageError
from engine.spec.policy import Policy
from engine.units import parse_bytes
from harness.engines.auto import AutoEngine, is_auto, with_auto
from harness.engines.settings import settings_from_args

if TYPE_CHECKING:
    from engine.engine import Engine
    from harness.tokenizer import Text

SCENARIOS = Path(__file__).resolve().parent.parent.parent / "scenarios"
FIXED_PADDING = 256
"""Tokens to whose multiple FlexGen's HELM application fills prompts up."""

POLICY_FILE = SCENARIOS / "policies.yaml"


def add_engine_options(parser: argparse.ArgumentParser, *model_flags: str) -> None:
    """Add the flags that say who answers.

    Args:
        model_flags: further names of ``--model``, such as ``-M``.
    """
    who = parser.add_argument_group("who answers")
    who.add_argument(
        "--model", *model_flags, type=some, required=True, metavar="FOLDER_OR_NAME",
        help="local folder or hub name",
    )  # fmt: skip
    who.add_argument(
        "--policy", default="resident", metavar="POLICY",
        help="a name from the policy file, key=value,..., or auto for what the planner finds; "
        "default: %(default)s",
    )  # fmt: skip
    add_format_options(who)
    add_running_options(who)
    add_memory_options(parser, "default: results/offload")


def add_format_options(who: argparse._ArgumentGroup) -> None:
    """Add the flags that overrule every policy: how weights and KV cache are kept, how prompts are taken."""
    who.add_argument(
        "--weight-quant", type=some, metavar="FORMAT",
        help="format of the weights, for instance 4, flexgen, 16, or by name 'mlp.*=3,default=4'; "
        "default: the policy's",
    )  # fmt: skip
    who.add_argument(
        "--kv-quant", type=some, metavar="FORMAT",
        help="format of the KV cache, for instance 4, kivi, 16; default: the policy's",
    )  # fmt: skip
    who.add_argument(
        "--prefix-sharing", choices=("auto", "on", "off"),
        help="whether prefixes that requests have in common are computed and kept once; default: the "
        "policy's",
    )  # fmt: skip
    who.add_argument(
        "--refill", choices=("on", "off"),
        help="whether a free slot goes to a waiting request at the next pass, or when the whole block is "
        "done; default: the policy's",
    )  # fmt: skip
    who.add_argument(
        "--padding", type=_padding, metavar="none|fixed|N",
        help=f"fill prompts up to a multiple of N tokens, fixed: {FIXED_PADDING}; default: the policy's",
    )  # fmt: skip


def parse_policy(text: str, known: Mapping[str, Policy], args: argparse.Namespace) -> Policy:
    """A policy with the flags of `add_format_options`, which become a part of its name.

    Raises:
        PolicyError: if the policy or a format is malformed.
    """
    keys = ("weight_quant", "kv_quant", "prefix_sharing", "refill", "padding")
    flags = {key: getattr(args, key) for key in keys}
    given = [f"{key}={str(value).replace(',', ';')}" for key, value in flags.items() if value is not None]
    return Policy.parse(",".join([text, *given]), with_auto(known))


def add_running_options(who: argparse._ArgumentGroup) -> None:
    """Add the flags, besides model and policy, of how the model is run."""
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


def add_memory_options(parser: argparse.ArgumentParser, offload_default: str) -> None:
    """Add the flags of the three tiers.

    Args:
        offload_default: says where the disk tier is when nothing is given.
    """
    budget = parser.add_argument_group("memory (sizes such as 16GiB; default: all that is free)")
    budget.add_argument("--device-memory", type=size, metavar="SIZE", help="most bytes of the device tier")
    budget.add_argument("--host-memory", type=size, metavar="SIZE", help="most bytes of the host tier")
    budget.add_argument("--disk", type=size, metavar="SIZE", help="most bytes of the disk tier")
    budget.add_argument(
        "--offload-dir", type=Path, metavar="FOLDER", help=f"of the disk tier; {offload_default}"
    )
    budget.add_argument(
        "--store", type=Path, metavar="FOLDER",
        help="of packed weights, for later runs; default: TIERBENCH_STORE, or tierbench/store in the "
        "user's cache",
    )  # fmt: skip
    budget.add_argument(
        "--verify", action="store_true", help="compare the store's checksums before its weights are used"
    )


def make_engine(args: argparse.Namespace, seed: int) -> tuple[Engine, Text]:
    """The engine and the tokenizer that the flags describe; weights are not loaded yet.

    Args:
        seed: of random weights.

    Raises:
        UsageError: for a model, policy, device or folder that cannot be used.
    """
    policy = parse_policy(args.policy, read_policies(args.policy_file), args)
    from harness.environment import check_torchvision

    check_torchvision()
    from engine.engine import Engine
    from harness.tokenizer import Text

    settings = settings_from_args(args, seed=seed)

    def say(notice: str) -> None:
        print(notice, file=sys.stderr)

    def make(policy: Policy) -> Engine:
        return Engine(settings, policy, say)

    engine = make(policy)
    if is_auto(policy):
        engine = cast("Engine", AutoEngine(make, policy, settings, say=say, first=engine))
    try:
        return engine, Text.load(settings.model, settings.trust_remote_code)
    except UsageError:
        engine.close()
        raise


def read_policies(path: Path) -> dict[str, Policy]:
    """Read a policy file: YAML, a mapping from names to mappings of a policy's keys.

    Raises:
        UsageError: if the file is missing.
        PolicyError: if it or a policy in it is malformed.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the policy file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: not UTF-8, or a date that is none
        raise PolicyError(f"the policy file {path} is not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise PolicyError(f"the policy file {path} must map names to mappings such as 'weights: 0.2/0.3/0.5'")
    if not content:
        raise PolicyError(f"the policy file {path} holds no policy: write at least one")
    for name, keys in content.items():
        for key in keys:
            if not isinstance(key, str):
                raise PolicyError(f"policy {name!r} of {path} has the key {key!r}, which is not a name")
    return {str(name): Policy.from_mapping({"name": str(name)} | value) for name, value in content.items()}


def size(text: str) -> int:
    """A flag's size in bytes."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _padding(text: str) -> int:
    """A flag's multiple of tokens."""
    words = {"none": 0, "fixed": FIXED_PADDING}
    if text not in words and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not none, fixed or a whole number of tokens")
    return words[text] if text in words else int(text)


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def some(text: str) -> str:
    """A flag's text, which must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a value or leave the flag out")
    return text
