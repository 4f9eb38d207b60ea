"""``run_helm.py batch``: answer a file of requests in the format of OpenAI's batch API."""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path
from typing import Any

from harness.commands.engine_options import add_engine_options, make_engine, positive

DESCRIPTION = (
    "Answer a file of requests in the format of OpenAI's batch API: one JSON object a line for "
    "/v1/completions or /v1/chat/completions. Answers are written as they finish, in any order; a line "
    "that cannot be answered becomes an error record. The same command given again continues an "
    "interrupted job by custom_id and tries the lines that were errors once more. The exit code is 0 if "
    "every line has its record, errors included; otherwise the job itself failed."
)

EPILOG = """\
examples:
  # what a file looks like: {"custom_id": "a", "method": "POST", "url": "/v1/completions",
  #                          "body": {"prompt": "Question: Is 24 even?", "max_tokens": 8}}
  run_helm.py batch --input requests.jsonl --output results.jsonl --model scenarios/demo/model

  # weights and KV cache on disk, at most 2 GiB of memory, 4-bit weights
  run_helm.py batch -i requests.jsonl -o offloaded.jsonl --model scenarios/demo/model \\
      --policy offloaded,weight_quant=4 --host-memory 2GiB

  # a file written for another server: its requests name the model gpt-4o-mini
  run_helm.py batch -i others.jsonl -o others-results.jsonl --model scenarios/demo/model \\
      --served-model-name gpt-4o-mini --seed 7
"""


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "batch",
        help="answer a file of requests in OpenAI's batch format",
        description=textwrap.fill(DESCRIPTION, 100),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "-i", "--input", "--input-file", type=Path, required=True, metavar="FILE", help="requests, JSON lines"
    )
    files.add_argument(
        "-o", "--output", "--output-file", type=Path, required=True, metavar="FILE",
        help="results, JSON lines; continued if it is there",
    )  # fmt: skip
    add_engine_options(parser)
    how = parser.add_argument_group("how requests are answered")
    how.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME",
        help="what the model of a request may be called too; the first name is written into answers "
        "(default: the folder's)",
    )  # fmt: skip
    how.add_argument(
        "--default-max-tokens", type=positive, default=512, metavar="N",
        help="most generated tokens of a chat request that does not say (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--window", type=positive, metavar="N",
        help="requests given to the engine at once; memory grows with it (default: 4096)",
    )  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of sampling and random weights (default: 0)")
    parser.set_defaults(execute=execute)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Answer the file and say on standard error what became of it.

    Raises:
        TierbenchError: if the job fails; a line that cannot be answered does not make it fail.
    """
    began = time.monotonic()
    engine, text = make_engine(args, args.seed)
    from harness.openai_batch.job import WINDOW, BatchOptions, run_batch
    from harness.progress.line import Progress

    own = [Path(args.model).resolve().name if Path(args.model).is_dir() else args.model, args.model]
    options = BatchOptions(
        input=args.input,
        output=args.output,
        policy=engine.policy,
        names=[*args.served_model_name, *own],
        seed=args.seed,
        chat_tokens=args.default_max_tokens,
        window=args.window or WINDOW,
    )
    progress = Progress()
    with engine:
        summary = run_batch(engine, text, options, progress)
        progress.say(summary.describe(time.monotonic() - began, engine.record().totals))
    return 0
