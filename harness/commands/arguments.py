"""Arguments that commands share, in groups: model, policy, workload, memory, output.

It knows the command line and what it describes: policies, options and an engine, which is asked nothing here.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import PolicyError, UsageError
from engine.spec.policy import Policy
from engine.units import parse_bytes
from harness.engines.auto import is_auto, with_auto

if TYPE_CHECKING:
    from engine.spec.settings import EngineSettings
    from harness.engines.protocol import EngineLike
    from harness.tokenizer import Text

Options = TypeVar("Options")

SCENARIOS = Path(__file__).resolve().parent.parent.parent / "scenarios"
FIXED_PADDING = 256
"""FlexGen's HELM application pads prompts to a multiple of this many tokens."""

POLICY_FILE = SCENARIOS / "policies.yaml"


def add_command(
    subparsers: Any, name: str, summary: str, description: str, epilog: str,
    execute: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:  # fmt: skip
    """Add a subcommand.

    Args:
        summary: its line in the list of commands.
        epilog: its examples, printed as they are written.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=textwrap.fill(description, 100), epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(execute=execute)
    return parser


def options_from_args(kind: type[Options], args: argparse.Namespace, **chosen: Any) -> Options:
    """A dataclass of options from the flags of the same names.

    Args:
        chosen: fields that the command decides, or that have no flag of their name.
    """
    given = vars(args) | chosen
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given})


def add_model_group(
    parser: argparse.ArgumentParser, *flags: str, default: str = ""
) -> argparse._ArgumentGroup:
    """Add the group of the model, its weights and the device that computes.

    Args:
        flags: further names of ``--model``, such as ``-M``.
        default: what is taken without ``--model``; empty if it has to be given.
    """
    group = parser.add_argument_group("model")
    more = f"; default: {default}" if default else ""
    group.add_argument(
        "--model", *flags, type=some, required=not default, metavar="FOLDER_OR_NAME",
        help=f"local folder or hub name{more}",
    )  # fmt: skip
    if default:
        group.add_argument(
            "--model-name", type=some, metavar="NAME", help="its name in tables; default: its folder's name"
        )
    add_running_options(group)
    return group


def add_running_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the device and of the model's weights and code."""
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or pretend (default: %(default)s)"
    )
    group.add_argument("--random-weights", action="store_true", help="use random weights: throughput only")
    group.add_argument(
        "--trust-remote-code", "--trust_remote_code", action="store_true",
        help="run code that comes with the model",
    )  # fmt: skip


def add_policy_group(
    parser: argparse.ArgumentParser, default: str = "resident", formats: bool = True
) -> argparse._ArgumentGroup:
    """Add the group of one policy.

    Args:
        formats: whether there are flags that overrule the policy, and ``auto`` for the planner's choice.
    """
    group = parser.add_argument_group("policy")
    auto = ", or auto for what the planner finds" if formats else ""
    group.add_argument(
        "--policy", default=default, metavar="POLICY",
        help=f"a name from the policy file, or key=value,...{auto}; default: %(default)s",
    )  # fmt: skip
    add_policy_file(group)
    if formats:
        add_format_options(group)
    return group


def add_policy_file(group: argparse._ArgumentGroup) -> None:
    """Add the file of named policies."""
    group.add_argument(
        "--policy-file", type=Path, default=POLICY_FILE, metavar="FILE", help="default: %(default)s"
    )


def add_format_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags that overrule every policy: formats of weights and KV cache, how prompts are batched."""
    group.add_argument(
        "--weight-quant", type=some, metavar="FORMAT",
        help="format of the weights, for instance 4, flexgen, 16, or by name 'mlp.*=3,default=4'; "
        "default: the policy's",
    )  # fmt: skip
    group.add_argument(
        "--kv-quant", type=some, metavar="FORMAT",
        help="format of the KV cache, for instance 4, kivi, 16; default: the policy's",
    )  # fmt: skip
    group.add_argument(
        "--prefix-sharing", choices=("auto", "on", "off"),
        help="whether common prefixes of requests are computed and kept once; default: the policy's",
    )  # fmt: skip
    group.add_argument(
        "--refill", choices=("on", "off"),
        help="whether a free slot goes to a waiting request at the next pass (on), or only when the whole "
        "block is done (off); default: the policy's",
    )  # fmt: skip
    group.add_argument(
        "--padding", type=_padding, metavar="none|fixed|N",
        help=f"pad prompts to a multiple of N tokens, fixed: {FIXED_PADDING}; default: the policy's",
    )  # fmt: skip


def add_entry_options(group: argparse._ArgumentGroup, demo_instances: int | None) -> None:
    """Add the flags that choose run entries, named as in `helm-run`.

    Args:
        demo_instances: evaluation instances per entry of the demo; None where there is no demo.
    """
    demo = f" ({demo_instances} for the demo)" if demo_instances else ""
    group.add_argument(
        "-r", "--run-entries", nargs="+", action="extend", default=[], metavar="ENTRY",
        help="name:key=value,...",
    )  # fmt: skip
    group.add_argument(
        "-c", "--conf-paths", nargs="+", action="extend", default=[], metavar="FILE",
        help="files of run entries",
    )  # fmt: skip
    group.add_argument(
        "-m", "--max-eval-instances", type=positive, metavar="N",
        help=f"maximum number of evaluation instances per run entry; default: all{demo}",
    )  # fmt: skip
    add_plugins(group)


def add_plugins(group: argparse._ArgumentGroup) -> None:
    """Add the flag that registers scenarios."""
    group.add_argument(
        "--plugins", nargs="+", action="extend", default=[], metavar="MODULE",
        help="modules or files that register more HELM scenarios",
    )  # fmt: skip


def add_load_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a synthetic load: prompts and answers of one length."""
    group.add_argument(
        "--prompt-len", type=positive, default=512, metavar="N",
        help="tokens of a prompt (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--gen-len", type=positive, default=32, metavar="N",
        help="tokens to generate for each (default: %(default)s)",
    )  # fmt: skip


def add_budgets(
    parser: argparse.ArgumentParser, default: str = "all that is free"
) -> argparse._ArgumentGroup:
    """Add the group of the tiers' budgets.

    Args:
        default: the budget of a tier for which none is given.
    """
    group = parser.add_argument_group(f"memory (sizes such as 16GiB; default: {default})")
    for flag, tier in (("--device-memory", "device"), ("--host-memory", "host"), ("--disk", "disk")):
        group.add_argument(flag, type=size, metavar="SIZE", help=f"maximum bytes of the {tier} tier")
    return group


def add_memory_group(parser: argparse.ArgumentParser, offload_default: str = "results/offload") -> None:
    """Add the group of the three tiers: budgets, folder of the disk tier, packed weights."""
    group = add_budgets(parser)
    group.add_argument(
        "--offload-dir", type=Path, metavar="FOLDER",
        help=f"folder of the disk tier; default: {offload_default}",
    )  # fmt: skip
    add_store(group)
    group.add_argument(
        "--verify", action="store_true", help="compare the store's checksums before its weights are used"
    )


def add_store(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the folder of the packed store."""
    group.add_argument(
        "--store", type=Path, metavar="FOLDER",
        help="folder of packed weights, kept for later runs; default: TIERBENCH_STORE, or tierbench/store in "
        "the user's cache folder",
    )  # fmt: skip


def add_output_path(group: argparse._ArgumentGroup | argparse.ArgumentParser, what: str = "") -> None:
    """Add the folder of all results.

    Args:
        what: where in it the command writes, such as ``the curve goes to FOLDER/curves/SUITE; ``.
    """
    group.add_argument(
        "-o", "--output-path", type=Path, default=Path("results"), metavar="FOLDER",
        help=f"{what}default: %(default)s",
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


def chosen_policy(args: argparse.Namespace) -> Policy:
    """The one policy that the flags of `add_engine_options` describe.

    Raises:
        PolicyError: if it is unknown or malformed.
    """
    return parse_policy(args.policy, read_policies(args.policy_file), args)


@contextmanager
def open_engine(settings: EngineSettings, policy: Policy) -> Iterator[tuple[EngineLike, Text]]:
    """An engine for requests that come later, and its tokenizer; weights are not loaded yet.

    Raises:
        UsageError: for a model, policy, device or folder that cannot be used.
    """
    from harness.environment import check_torchvision

    check_torchvision()
    from engine.engine import Engine
    from harness.engines.auto import PlannedEngine
    from harness.tokenizer import Text

    make = PlannedEngine if is_auto(policy) else Engine
    with closing(make(settings, policy, say)) as engine:
        yield engine, Text.load(settings.model, settings.trust_remote_code)


def say(notice: str) -> None:
    """Show a line about what there is to wait for."""
    print(notice, file=sys.stderr)


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
