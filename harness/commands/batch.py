"""``run_helm.py batch``: answer a file of requests in the format of OpenAI's batch API."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from harness.commands.arguments import add_engine_groups, chosen_policy, open_engine, options_from_args
from harness.commands.flags import COUNT, FILE, add_flag
from harness.engines.settings import settings_from_args

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    files = parser.add_argument_group("files")
    add_flag(files, "-i --input --input-file", "requests, JSON lines", FILE, required=True)
    results = "results, JSON lines; continued if it is there"
    add_flag(files, "-o --output --output-file", results, FILE, required=True)
    add_engine_groups(parser)
    how = parser.add_argument_group("workload")
    add_flag(
        how, "--served-model-name", nargs="+", default=[], metavar="NAME",
        text="names by which requests may call the model; the first is written into answers; default: the "
        "folder's",
    )  # fmt: skip
    most = "maximum number of generated tokens of a chat request that names none"
    add_flag(how, "--default-max-tokens", most, COUNT, 512)
    at_once = "requests given to the engine at once; memory grows with it; default: 4096"
    add_flag(how, "--window", at_once, COUNT)
    add_flag(how, "--seed", "of sampling and random weights", type=int, default=0)
    same = "say nothing of when, and beside which others, a line was answered: results are equal byte by byte"
    add_flag(how, "--reproducible", same, action="store_true")


def execute(args: argparse.Namespace) -> int:
    """Answer the file and print a summary on standard error.

    Raises:
        TierbenchError: if the job fails; a line that cannot be answered does not make it fail.
    """
    began = time.monotonic()
    policy = chosen_policy(args)
    from harness.openai_batch.job import WINDOW, BatchOptions, run_batch
    from harness.progress.line import Progress

    own = [Path(args.model).resolve().name if Path(args.model).is_dir() else args.model, args.model]
    options = options_from_args(
        BatchOptions, args, policy=policy, names=[*args.served_model_name, *own],
        chat_tokens=args.default_max_tokens, window=args.window or WINDOW,
    )  # fmt: skip
    progress = Progress()
    with open_engine(settings_from_args(args), policy) as (engine, text):
        summary = run_batch(engine, text, options, progress)
        progress.say(summary.describe(time.monotonic() - began, engine.record().totals))
    return 0
