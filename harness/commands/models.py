"""``run_helm.py models``: which model families the engine answers, and what one checkpoint is."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING

from engine.errors import UsageError, did_you_mean
from engine.units import format_bytes
from harness.commands.flags import SWITCH, add_flag, some
from harness.engines.settings import settings_from_args
from harness.text_table import markdown_table

if TYPE_CHECKING:
    from engine.families import Family
    from engine.spec.model import ModelSpec

DESCRIPTION = (
    "Without a model: every family for which the installed transformers has a causal language model or a "
    "wrapper with a text decoder, tried as a small random model against transformers itself. With a folder "
    "or hub name: what that checkpoint is, from its config and the headers of its weights; nothing is loaded."
)

EPILOG = """\
examples:
  # the table of all families; some minutes
  run_helm.py models

  # some of them
  run_helm.py models --family qwen3 gemma3 falcon

  # one checkpoint: layers by kind, bytes per sequence and token, tensors left out
  run_helm.py models scenarios/demo/model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", nargs="?", type=some, metavar="MODEL", help="a local folder or hub name")
    add_flag(
        parser, "--family", type=some, nargs="+", metavar="TYPE", default=[],
        text="families to try, by the model_type of their config; default: all",
    )  # fmt: skip
    add_flag(parser, "--random-weights", "tell of a folder that has a config only", SWITCH)
    add_flag(parser, "--trust-remote-code", "run code that comes with the model", SWITCH)


def execute(args: argparse.Namespace) -> int:
    """Print the table, or what one model is.

    Raises:
        UsageError: for families together with a model, and for one that transformers does not have.
        ModelError: for a model that cannot be used.
    """
    if args.model and args.family:
        raise UsageError("models takes a model or --family, not both")
    if not args.model:
        return _print_families(args.family)
    from engine.engine import Engine

    with Engine(settings_from_args(args, device="cpu"), on_notice=None) as engine:
        print("\n".join(describe_model(engine.spec)))
    return 0


def _print_families(chosen: list[str]) -> int:
    import transformers

    from engine.families import family_types, try_family

    known = family_types()
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"transformers {transformers.__version__} has no family {name!r}{did_you_mean(name, known)}"
            )
    found = []
    for family in map(try_family, chosen or known):
        found.append(family)
        print(f"{family.model_type}: {family.verdict} ({family.detail})", file=sys.stderr)
    print("\n".join(families_table(found, transformers.__version__)))
    return 0


def families_table(families: list[Family], version: str) -> list[str]:
    """Lines of Markdown: counts, then a row for each family."""
    lines = [f"Tried with transformers {version}, default config of each family, on a CPU:", ""]
    for is_wrapper, what in ((False, "text models"), (True, "wrappers with a text decoder")):
        counts = Counter(family.verdict for family in families if family.is_wrapper is is_wrapper)
        if counts:
            shown = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
            lines.append(f"- {what}: {shown}")
    rows = [("family", "class", "verdict", "attention runs, or the reason")]
    rows += [(f"`{f.model_type}`", f.architecture, f.verdict, f.detail) for f in families]
    return [*lines, "", *markdown_table(rows, left=4, padded=False)]


def describe_model(spec: ModelSpec) -> list[str]:
    """What a checkpoint is, in lines of text."""
    from engine.families import layer_kinds

    weights = sum(tensor.nbytes for tensor in spec.tensors.values())
    formats = Counter(
        str(tensor.packed) if tensor.packed else tensor.dtype for tensor in spec.tensors.values()
    )
    token = sum(keys + values for keys, values in spec.kv_widths) * spec.compute_bytes
    state = sum(part.nbytes for layer in spec.states for part in layer)
    longest = f", at most {spec.max_positions:,} of them" if spec.max_positions else ""
    lines = [
        f"{spec.path}: {spec.architecture} ({spec.model_type}), {spec.num_parameters:,} parameters",
        f"weights: {format_bytes(weights)}; tensors by format: "
        + ", ".join(f"{count:,} {name}" for name, count in formats.most_common()),
        f"attention: {'transformers own code, sequence by sequence' if spec.own_attention else 'packed'}, "
        f"{spec.num_heads} heads",
        f"KV cache: {format_bytes(token)} per token in {spec.compute_dtype}{longest}",
    ]
    if state:
        lines.append(f"state: {format_bytes(state)} per sequence")
    if spec.experts_per_token:
        lines.append(f"experts: {spec.experts_per_token} per token")
    rows = [("layers", "number", "KV values per token", "weights of one")]
    rows += [
        (kind.what, str(kind.count), f"{kind.key_values:,}", format_bytes(kind.weight_bytes))
        for kind in layer_kinds(spec)
    ]
    lines += ["", *markdown_table(rows, left=1), ""]
    largest = max(sum(spec.tensors[name].nbytes for name in names) for names in spec.stages[1:])
    lines.append(
        f"a plan holds at least: two buffers of the largest stage ({format_bytes(2 * largest)}) near the "
        f"device where weights are elsewhere, {format_bytes(token)} for every token of a block"
        + (f", {format_bytes(state)} for each of its sequences" if state else "")
    )
    groups = ", ".join(f"{group} ({count:,})" for group, count in spec.left_out.items())
    lines.append(f"left out, as text needs none of them: {groups}" if groups else "no tensor is left out")
    return lines
