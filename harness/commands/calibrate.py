"""``run_helm.py calibrate``: statistics of a model's activations, by which w8a8 smooths outliers."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from harness.commands.engine_options import add_engine_options, make_engine, positive

DESCRIPTION = (
    "Run prompts of your own through a model and keep the largest magnitude of every input channel of "
    "every linear layer. A policy with weight_quant=w8a8,calibration=FILE moves the outliers of the "
    "activations into the weights by it (SmoothQuant) before both are rounded to 8 bits."
)

EPILOG = """\
examples:
  # prompts.txt holds one prompt a line; some dozens that look like the later ones are enough
  run_helm.py calibrate --model scenarios/demo/model --prompts prompts.txt --output demo.safetensors

  # use it
  run_helm.py run --policy resident weight_quant=w8a8,calibration=demo.safetensors -r form_processing -m 20

  # JSON lines with a "prompt" or a "text", at most 128 of them, weights on disk
  run_helm.py calibrate --model scenarios/demo/model --prompts prompts.jsonl --num-samples 128 \\
      --policy offloaded -o demo.safetensors
"""


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "calibrate",
        help="statistics of a model's activations, for w8a8",
        description=textwrap.fill(DESCRIPTION, 100),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE",
        help="one prompt a line, or .jsonl with a prompt or text a line",
    )  # fmt: skip
    files.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="statistics, safetensors"
    )
    how = parser.add_argument_group("how much is read")
    how.add_argument(
        "--num-samples", type=positive, default=512, metavar="N", help="most prompts (default: %(default)s)"
    )
    how.add_argument(
        "--max-length", type=positive, default=512, metavar="N",
        help="most tokens of a prompt (default: %(default)s)",
    )  # fmt: skip
    add_engine_options(parser)
    parser.set_defaults(execute=execute)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run the prompts and write the statistics.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    from harness.sweep.calibrate import calibrate, read_prompts

    prompts = read_prompts(args.prompts, args.num_samples)
    engine, text = make_engine(args, seed=0)
    with engine:
        calibrate(engine, text, prompts, args.max_length, args.output)
    print(f"statistics: {args.output}; use them with weight_quant=w8a8,calibration={args.output}")
    return 0
