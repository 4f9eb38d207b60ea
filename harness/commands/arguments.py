"""Arguments that commands share, in groups: model, policy, workload, memory, output.

It knows the command line and what it describes: policies, options and an engine, which is asked nothing here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import PolicyError, UsageError
from engine.files.documents import DocumentError, read_yaml
from engine.spec.policy import Policy
from harness.commands.flags import (
    COUNT,
    FILE,
    FIXED_PADDING,
    FOLDER,
    SWITCH,
    Group,
    add_flag,
    padding,
    several,
    size,
    some,
)
from harness.engines.auto import is_auto, with_auto
from harness.escape import plain

if TYPE_CHECKING:
    from engine.spec.settings import EngineSettings
    from harness.engines.protocol import EngineLike
    from harness.tokenizer import Text

Options = TypeVar("Options")

SCENARIOS = Path(__file__).resolve().parent.parent.parent / "scenarios"
POLICY_FILE = SCENARIOS / "policies.yaml"


def options_from_args(kind: type[Options], args: argparse.Namespace, **chosen: Any) -> Options:
    """A dataclass of options from the flags of the same names.

    Args:
        chosen: fields that the command decides, or that have no flag of their name.
    """
    given = vars(args) | chosen
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given})


def add_engine_groups(parser: argparse.ArgumentParser, model_flags: str = "--model") -> None:
    """Add the groups of one engine: its model, its policy (see `chosen_policy`) and its memory."""
    add_model_group(parser, model_flags)
    add_policy_group(parser)
    add_memory_group(parser)


def add_model_group(parser: argparse.ArgumentParser, flags: str = "--model", default: str = "") -> Group:
    """Add the group of the model, its weights and the device that computes.

    Args:
        flags: names of ``--model``.
        default: what is taken without ``--model``; empty if it has to be given.
    """
    group = parser.add_argument_group("model")
    more = f"; default: {default}" if default else ""
    add_flag(
        group, flags, f"local folder or hub name{more}", type=some, required=not default,
        metavar="FOLDER_OR_NAME",
    )  # fmt: skip
    adapter = "folder of a PEFT adapter (LoRA) that is merged into the model's weights"
    add_flag(group, "--adapter", adapter, FOLDER)
    if default:
        name = "its name in tables; default: its folder's name"
        add_flag(group, "--model-name", name, type=some, metavar="NAME")
    add_running_options(group)
    return group


def add_running_options(group: Group) -> None:
    """Add the flags of the device and of the model's weights and code."""
    add_flag(group, "--device", "auto, cpu, cuda, cuda:N or pretend", default="auto")
    add_flag(group, "--random-weights", "use random weights: throughput only", SWITCH)
    add_flag(group, "--trust-remote-code --trust_remote_code", "run code that comes with the model", SWITCH)


def add_policy_group(
    parser: argparse.ArgumentParser, default: str = "resident", formats: bool = True
) -> None:
    """Add the group of one policy.

    Args:
        formats: whether there are flags that overrule the policy, and ``auto`` for the planner's choice.
    """
    group = parser.add_argument_group("policy")
    auto = ", or auto for what the planner finds" if formats else ""
    text = f"a name from the policy file, or key=value,...{auto}"
    add_flag(group, "--policy", text, default=default, metavar="POLICY")
    add_flag(group, "--policy-file", "", FILE, POLICY_FILE)
    if formats:
        add_format_options(group)


def add_format_options(group: Group) -> None:
    """Add the flags that overrule every policy: formats of weights and KV cache, how prompts are batched."""
    add_flag(
        group, "--weight-quant", type=some, metavar="FORMAT",
        text="format of the weights, for instance 4, flexgen, 16, or by name 'mlp.*=3,default=4'; "
        "default: the policy's",
    )  # fmt: skip
    kv_quant = "format of the KV cache, for instance 4, kivi, 16; default: the policy's"
    add_flag(group, "--kv-quant", kv_quant, type=some, metavar="FORMAT")
    sharing = "whether common prefixes of requests are computed and kept once; default: the policy's"
    add_flag(group, "--prefix-sharing", sharing, choices=("auto", "on", "off"))
    add_flag(
        group, "--refill", choices=("on", "off"),
        text="whether a free slot goes to a waiting request at the next pass (on), or only when the whole "
        "block is done (off); default: the policy's",
    )  # fmt: skip
    multiple = f"pad prompts to a multiple of N tokens, fixed: {FIXED_PADDING}; default: the policy's"
    add_flag(group, "--padding", multiple, type=padding, metavar="none|fixed|N")


def add_entry_options(group: Group, demo_instances: int | None) -> None:
    """Add the flags that choose run entries, named as in `helm-run`.

    Args:
        demo_instances: evaluation instances per entry of the demo; None where there is no demo.
    """
    demo = f" ({demo_instances} for the demo)" if demo_instances else ""
    add_flag(group, "-r --run-entries", "name:key=value,...", several("ENTRY"))
    add_flag(group, "-c --conf-paths", "files of run entries", several("FILE"))
    most = f"maximum number of evaluation instances per run entry; default: all{demo}"
    add_flag(group, "-m --max-eval-instances", most, COUNT)
    add_plugins(group)


def add_chat(group: Group) -> None:
    """Add the flag that says how prompts are asked."""
    add_flag(
        group, "--chat", choices=("auto", "on", "off"), default="auto",
        text="whether prompts of run entries are put as a user's message into the tokenizer's chat template; "
        "auto: where it has one, as HELM's own client does",
    )  # fmt: skip


def add_plugins(group: Group) -> None:
    """Add the flag that registers scenarios."""
    add_flag(group, "--plugins", "modules or files that register more HELM scenarios", several("MODULE"))


def add_load_options(group: Group) -> None:
    """Add the flags of a synthetic load: prompts and answers of one length."""
    add_flag(group, "--prompt-len", "tokens of a prompt", COUNT, 512)
    add_flag(group, "--gen-len", "tokens to generate for each", COUNT, 32)


def add_budgets(parser: argparse.ArgumentParser, default: str = "all that is free") -> Group:
    """Add the group of the tiers' budgets.

    Args:
        default: the budget of a tier for which none is given.
    """
    group = parser.add_argument_group(f"memory (sizes such as 16GiB; default: {default})")
    for flag, tier in (("--device-memory", "device"), ("--host-memory", "host"), ("--disk", "disk")):
        add_flag(group, flag, f"maximum bytes of the {tier} tier", type=size, metavar="SIZE")
    return group


def add_memory_group(parser: argparse.ArgumentParser, offload_default: str = "results/offload") -> None:
    """Add the group of the three tiers: budgets, folder of the disk tier, packed weights."""
    group = add_budgets(parser)
    add_flag(group, "--offload-dir", f"folder of the disk tier; default: {offload_default}", FOLDER)
    add_store(group)
    verified = "read checkpoint and store whole, and compare checksums, before weights are used"
    add_flag(group, "--verify", verified, SWITCH)


def add_store(group: Group) -> None:
    """Add the folder of the packed store."""
    add_flag(
        group, "--store", kind=FOLDER,
        text="folder of packed weights, kept for later runs; default: TIERBENCH_STORE, or tierbench/store in "
        "the user's cache folder",
    )  # fmt: skip


def add_output_path(group: Group, text: str = "") -> None:
    """Add the folder of all results.

    Args:
        text: where in it the command writes, such as ``the curve goes to FOLDER/curves/SUITE``.
    """
    add_flag(group, "-o --output-path", text, FOLDER, Path("results"))


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
    """The one policy that the flags of `add_engine_groups` describe.

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
    from harness.environment import check_torchvision, require_memory_for

    require_memory_for("torch")
    check_torchvision()
    from engine.engine import Engine
    from harness.engines.auto import PlannedEngine
    from harness.tokenizer import Text

    make = PlannedEngine if is_auto(policy) else Engine
    with closing(make(settings, policy, say)) as engine:
        yield engine, Text.load(settings.model, settings.trust_remote_code)


def say(notice: str) -> None:
    """Show a line about what there is to wait for."""
    print(plain(notice), file=sys.stderr)


def read_policies(path: Path) -> dict[str, Policy]:
    """Read a policy file: YAML, a mapping from names to mappings of a policy's keys.

    Raises:
        UsageError: if the file is missing.
        PolicyError: if it or a policy in it is malformed.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UsageError(f"the policy file {path} cannot be read: {error.strerror}") from None
    except DocumentError as error:
        raise PolicyError(f"the policy file {path} {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise PolicyError(f"the policy file {path} must map names to mappings such as 'weights: 0.2/0.3/0.5'")
    if not content:
        raise PolicyError(f"the policy file {path} holds no policy: write at least one")
    for name, keys in content.items():
        for key in keys:
            if not isinstance(key, str):
                raise PolicyError(f"policy {name!r} of {path} has the key {key!r}, which is not a name")
    return {str(name): Policy.from_mapping({"name": str(name)} | value) for name, value in content.items()}
