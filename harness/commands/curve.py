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
    add_command,
    add_entry_options,
    add_memory_group,
    add_model_group,
    add_output_path,
    add_policy_group,
    options_from_args,
    positive,
    read_policies,
    some,
)  # fmt: skip
from harness.commands.run import DEMO_MODEL, DEMO_NAME
from harness.engines.settings import settings_from_args

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


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "curve", "compare compression formats with full precision", DESCRIPTION, EPILOG, execute
    )
    _add_formats(parser)
    _add_questions(parser)
    who = add_model_group(parser, default="the demo model")
    who.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    add_policy_group(parser, formats=False)
    add_memory_group(parser, "OUTPUT/offload")
    where = parser.add_argument_group("output")
    where.add_argument(
        "--suite", type=some, default="default", help="name of the curve (default: %(default)s)"
    )
    add_output_path(where, "the curve goes to FOLDER/curves/SUITE; ")
    where.add_argument(
        "--keep-reference", action="store_true", help="keep the file of full precision's logits at the end"
    )
    parser.set_defaults(what_runs=what_runs)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Sweep, draw the curve, print the table.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    from harness.report.plots.bits import write_curve
    from harness.sweep.runner import run_curve

    result = run_curve(make_options(args))
    write_curve(result.folder)
    print(result.shown)
    print(f"curve: {result.folder}")
    for failure in result.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if result.failures else 0


def make_options(args: argparse.Namespace) -> CurveOptions:
    """Fill in what was not given.

    Raises:
        PolicyError: for an unknown or malformed policy, format or file of them.
    """
    from engine.spec.format_key import reference_of
    from harness.sweep.formats import choose_formats
    from harness.sweep.options import CurveOptions

    chosen = _with_defaults(args)
    base = reference_of(Policy.parse(args.policy, read_policies(args.policy_file)))
    settings = settings_from_args(
        args,
        model=str(chosen["model"]),
        host_memory=chosen["host_memory"],
        offload_dir=args.offload_dir or args.output_path / "offload",
    )
    return options_from_args(
        CurveOptions,
        args,
        settings=settings,
        model_name=chosen["model_name"],
        base=base,
        formats=choose_formats(args.formats, read_policies(chosen["format_file"]), base),
        run_entries=chosen["run_entries"],
        max_eval_instances=chosen["max_eval_instances"],
        dataset=chosen["dataset"],
        last_word=chosen["last_word"],
        repeats=args.speed_repeats,
        published=args.paper,
    )


def what_runs(args: argparse.Namespace) -> dict[str, Any]:
    """The values of flags that were not given and depend on others, for ``--print-config``."""
    from harness.sweep.formats import choose_formats  # a wrong format shows here, too

    chosen = _with_defaults(args)
    known = read_policies(chosen["format_file"])
    choose_formats(args.formats, known, Policy())
    return chosen | {
        "formats": list(args.formats or known),
        "offload_dir": args.offload_dir or args.output_path / "offload",
    }


def _add_formats(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("formats")
    group.add_argument(
        "--formats", nargs="+", action="extend", default=[], metavar="FORMAT",
        help="names from the format file, or key=value,... of weight_quant, kv_quant, attention_fraction, "
        "calibration, matmul_precision; default: all of the file. Full precision is always measured first",
    )  # fmt: skip
    group.add_argument(
        "--format-file", type=Path, metavar="FILE", help=f"default: {FORMATS}, or the paper's with --paper"
    )
    group.add_argument(
        "--accept", type=_fraction, default=0.99, metavar="PART",
        help="a format is accepted if it keeps this part of full precision's accuracy with 95 %% confidence "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--paper", action="store_true",
        help="the formats and data of the FlexGen paper's accuracy table (LAMBADA, WikiText), no run "
        "entries, and its published figures beside the measured ones; the model is OPT-30B unless given",
    )  # fmt: skip


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload (default: the demo's run entries and text)")
    add_entry_options(group, DEMO_INSTANCES)
    group.add_argument(
        "--answers", type=positive, default=100, metavar="N",
        help="maximum correct answers per run entry whose likelihood is measured (default: %(default)s)",
    )  # fmt: skip
    text = group.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, metavar="FILE", help="running text whose perplexity is measured")
    text.add_argument(
        "--dataset", type=some, metavar="NAME[:CONFIG[:SPLIT]]",
        help="the same from a data set of the hub, its column text; demo: text that the demo model has "
        "not seen",
    )  # fmt: skip
    group.add_argument(
        "--window", type=positive, metavar="N",
        help="tokens of a window of running text; default: the model's (at most 256 of the demo's text)",
    )  # fmt: skip
    group.add_argument(
        "--stride", type=positive, metavar="N", help="scored tokens of each window; default: half of it"
    )
    group.add_argument(
        "--text-tokens", type=positive, default=4096, metavar="N",
        help="maximum scored tokens of running text (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--last-word", type=some, metavar="FILE",
        help='passages whose last word is to be found: JSONL of {"text": ...}, or lambada (from the hub)',
    )  # fmt: skip
    group.add_argument(
        "--divergence-tokens", type=_count, default=4096, metavar="N",
        help="maximum positions at which distributions are compared; 0 for none (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--speed-repeats", type=positive, default=3, metavar="N",
        help="how often generation is timed (default: %(default)s)",
    )  # fmt: skip


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
        "window": args.window,
        "last_word": args.last_word or (LAMBADA if args.paper else None),
        "host_memory": args.host_memory or default_memory,
    }


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)
