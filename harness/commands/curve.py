"""``run_helm.py curve``: what each compression format costs in accuracy, and which one is good enough."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.spec.policy import Policy
from engine.units import MIB
from harness.commands.arguments import (
    SCENARIOS,
    add_chat,
    add_entry_options,
    add_memory_group,
    add_model_group,
    add_output_path,
    add_policy_group,
    options_from_args,
    read_policies,
)
from harness.commands.flags import COUNT, FILE, SWITCH, Group, add_flag, number, positive, several, some
from harness.commands.run import DEMO_MODEL, DEMO_NAME
from harness.engines.settings import settings_from_args
from harness.escape import plain

if TYPE_CHECKING:
    from harness.sweep.options import CurveOptions

FORMATS = SCENARIOS / "formats.yaml"
PAPER_FORMATS = SCENARIOS / "formats_paper.yaml"

DEMO_ENTRIES = (
    "key_value_recall",
    "information_extraction",
    "form_processing",
    "synthetic_reasoning:mode=pattern_match",
    "data_imputation",
    "error_detection",
)
"""What the demo model has learned."""

DEMO_INSTANCES = 200
DEMO_MEMORY = 512 * MIB
"""Host memory of the demo, so that its largest blocks are the same on every machine."""

DESCRIPTION = (
    "Compare compression formats with full precision: accuracy on HELM run entries, likelihood of correct "
    "answers and of running text, last words, divergence, bytes as stored, speed. Writes a table and "
    "pictures, and marks the cheapest format that keeps enough accuracy, with confidence. What is not given "
    "is the demo's. A sweep that was interrupted continues when the same command is given again."
)

EPILOG = """\
examples:
  # what 4 bits cost the demo model, ours and FlexGen's, weights and KV cache
  run_helm.py curve --formats w4kv4 w4kv4-flexgen --suite four

  # a text of one's own, one format from the file and one written out
  run_helm.py curve --text notes.txt --window 256 --formats w3 name=mine,weight_quant=3-g32-mse,kv_quant=kivi

  # the accuracy table of the FlexGen paper, its published figures beside; downloads model and data
  run_helm.py curve --paper --model facebook/opt-30b --policy offloaded --host-memory 90GiB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    _add_formats(parser.add_argument_group("formats"))
    _add_questions(parser.add_argument_group("workload (default: the demo's run entries and text)"))
    who = add_model_group(parser, default="the demo model")
    add_flag(who, "--seed", "of random weights", type=int, default=0)
    add_policy_group(parser, formats=False)
    add_memory_group(parser, "OUTPUT/offload")
    where = parser.add_argument_group("output")
    add_flag(where, "--suite", "name of the curve", type=some, default="default")
    add_output_path(where, "the curve goes to FOLDER/curves/SUITE")
    add_flag(where, "--keep-reference", "keep the file of full precision's logits at the end", SWITCH)


def execute(args: argparse.Namespace) -> int:
    """Sweep, draw the curve, print the table."""
    from harness.report.plots.bits import write_curve
    from harness.sweep.runner import run_curve

    result = run_curve(make_options(args))
    write_curve(result.folder)
    print(result.shown)
    print(f"curve: {result.folder}")
    for failure in result.failures:
        print(f"error: {plain(failure)}", file=sys.stderr)
    return 1 if result.failures else 0


def make_options(args: argparse.Namespace) -> CurveOptions:
    """Fill in what was not given.

    Raises:
        PolicyError: for an unknown or malformed policy, format or file of them.
    """
    from engine.spec.format_key import reference_of
    from harness.sweep.formats import choose_formats
    from harness.sweep.options import CurveOptions

    args = argparse.Namespace(**vars(args) | _with_defaults(args))
    base = reference_of(Policy.parse(args.policy, read_policies(args.policy_file)))
    return options_from_args(
        CurveOptions,
        args,
        settings=settings_from_args(args),
        base=base,
        formats=choose_formats(args.formats, read_policies(args.format_file), base),
        repeats=args.speed_repeats,
        published=args.paper,
    )


def what_runs(args: argparse.Namespace) -> dict[str, Any]:
    """The values of flags that were not given and depend on others, for ``--print-config``."""
    make_options(args)  # a wrong format shows here, too
    chosen = _with_defaults(args)
    return chosen | {"formats": args.formats or list(read_policies(chosen["format_file"]))}


def _add_formats(group: Group) -> None:
    add_flag(
        group, "--formats", kind=several("FORMAT"),
        text="names from the format file, or key=value,... of weight_quant, kv_quant, attention_fraction, "
        "calibration, matmul_precision; default: all of the file. Full precision is always measured first",
    )  # fmt: skip
    add_flag(group, "--format-file", f"default: {FORMATS}, or the paper's with --paper", FILE)
    add_flag(
        group, "--accept", default=0.99, metavar="PART",
        type=number(lambda part: 0 < part <= 1, "above 0 and at most 1"),
        text="a format is accepted if it keeps this part of full precision's accuracy with 95 %% confidence",
    )  # fmt: skip
    add_flag(
        group, "--paper", kind=SWITCH,
        text="the formats and data of the FlexGen paper's accuracy table (LAMBADA, WikiText), no run "
        "entries, and its published figures beside the measured ones; the model is OPT-30B unless given",
    )  # fmt: skip


def _add_questions(group: Group) -> None:
    add_entry_options(group, DEMO_INSTANCES)
    add_chat(group)
    answers = "maximum correct answers per run entry whose likelihood is measured"
    add_flag(group, "--answers", answers, COUNT, 100)
    text = group.add_mutually_exclusive_group()
    add_flag(text, "--text", "running text whose perplexity is measured", FILE)
    add_flag(
        text, "--dataset", type=some, metavar="NAME[:CONFIG[:SPLIT]]",
        text="the same from a data set of the hub, its column text; demo: text that the demo model has "
        "not seen",
    )  # fmt: skip
    window = "tokens of a window of running text; default: the model's (at most 256 of the demo's text)"
    add_flag(group, "--window", window, COUNT)
    add_flag(group, "--stride", "scored tokens of each window; default: half of it", COUNT)
    add_flag(group, "--text-tokens", "maximum scored tokens of running text", COUNT, 4096)
    passages = 'passages whose last word is to be found: JSONL of {"text": ...}, or lambada (from the hub)'
    add_flag(group, "--last-word", passages, type=some, metavar="FILE")
    positions = "maximum positions at which distributions are compared; 0 for none"
    add_flag(group, "--divergence-tokens", positions, default=4096, type=_count, metavar="N")
    add_flag(group, "--speed-repeats", "how often generation is timed", COUNT, 3)


def _with_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Values for flags that were not given: the paper's, or the demo's where no workload was given."""
    from harness.sweep import paper as curve_paper
    from harness.sweep.texts import DEMO, LAMBADA

    asked = bool(args.run_entries or args.conf_paths or args.text or args.dataset or args.last_word)
    demo = not asked and not args.paper
    model = args.model or (curve_paper.MODEL if args.paper else str(DEMO_MODEL))
    own_memory = args.device_memory or args.host_memory
    default_memory = None if args.model or args.paper or own_memory else DEMO_MEMORY
    named = args.model or args.paper
    return {
        "model": model,
        "model_name": args.model_name or (Path(model).resolve().name if named else DEMO_NAME),
        "format_file": args.format_file or (PAPER_FORMATS if args.paper else FORMATS),
        "run_entries": list(DEMO_ENTRIES) if demo else args.run_entries,
        "max_eval_instances": args.max_eval_instances or (DEMO_INSTANCES if demo else None),
        "dataset": args.dataset
        or (DEMO if demo else curve_paper.DATASET if args.paper and not args.text else None),
        "last_word": args.last_word or (LAMBADA if args.paper else None),
        "host_memory": args.host_memory or default_memory,
        "offload_dir": args.offload_dir or args.output_path / "offload",
    }


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)
