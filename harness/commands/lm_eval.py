"""``run_helm.py lm-eval``: evaluate tasks of lm-evaluation-harness with the engine."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from engine.errors import UsageError
from harness.commands.arguments import (
    add_command,
    add_memory_group,
    add_model_group,
    add_policy_group,
    chosen_policy,
    open_engine,
)  # fmt: skip
from harness.engines.settings import settings_from_args

DESCRIPTION = (
    "Evaluate tasks of lm-evaluation-harness (lm_eval, an optional package) with its own flags, result "
    "files and table; all requests of one type are one call to the engine. An interrupted evaluation "
    "continues if --use_cache was given."
)

EPILOG = """\
examples:
  # a task file of your own in the folder my_tasks; lm-eval's own tasks need no folder, but a network
  run_helm.py lm-eval --model scenarios/demo/model --include_path my_tasks --tasks my_choice --limit 5

  # two tasks with examples, weights and KV cache on disk, every sample kept
  run_helm.py lm-eval --model scenarios/demo/model --policy offloaded --include_path my_tasks \\
      --tasks my_choice,my_answers --num_fewshot 2 --output_path results/lm-eval --log_samples

  # sampled generations of a task, 4-bit weights and KV cache
  run_helm.py lm-eval --model scenarios/demo/model --policy resident,weight_quant=4,kv_quant=4 \\
      --include_path my_tasks --tasks my_answers \\
      --gen_kwargs do_sample=True,temperature=0.7,max_gen_toks=32
"""

_SETTINGS = (
    "num_fewshot", "limit", "include_path", "output_path", "log_samples", "use_cache", "write_out",
    "show_config", "predict_only", "system_instruction", "apply_chat_template", "fewshot_as_multiturn",
    "confirm_run_unsafe_code", "trust_remote_code",
)  # fmt: skip
"""Flags that are fields of lm-eval's configuration as they are."""

_REFUSED = {
    ("-b", "--batch_size"): "the policy says it: --policy NAME,device_batch=N,num_device_batches=N",
    ("-a", "--model_args"): "give --model FOLDER_OR_NAME, --policy and --device",
}
"""Flags of lm-eval that have other names here."""


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "lm-eval", "evaluate tasks of lm-evaluation-harness (lm_eval)",
        DESCRIPTION, EPILOG, execute,
    )  # fmt: skip
    _add_task_options(parser)
    add_model_group(parser, "-M")
    add_policy_group(parser)
    add_memory_group(parser)
    where = parser.add_argument_group("output")
    where.add_argument(
        "-o", "--output_path", metavar="PATH", help="folder or .json file of the results; default: none kept"
    )
    where.add_argument(
        "-s", "--log_samples", action="store_true", help="keep every sample beside the results"
    )
    where.add_argument("-c", "--use_cache", metavar="PATH", help="data base of answers to keep and to reuse")
    where.add_argument("-w", "--write_out", action="store_true", help="print the first prompts of each task")
    where.add_argument("--show_config", action="store_true", help="print all results and settings as JSON")
    for flags, cure in _REFUSED.items():
        parser.add_argument(*flags, nargs="*", action=_Refused, const=cure, help=argparse.SUPPRESS)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Evaluate, print lm-eval's table, say where its files are.

    Raises:
        TierbenchError: for every error that a user can cause, and if lm-eval fails.
    """
    from harness.lm_eval.evaluate import LmEvalOptions, evaluate, key_values, require_lm_eval

    require_lm_eval()
    settings: dict[str, Any] = {name: getattr(args, name) for name in _SETTINGS}
    settings["gen_kwargs"] = key_values(args.gen_kwargs, "--gen_kwargs")
    settings["metadata"] = {"pretrained": args.model} | key_values(args.metadata, "--metadata")
    settings["samples"] = args.samples
    settings["seed"] = _seeds(args.seed)
    names = [name for text in args.tasks for name in text.split(",") if name]
    if not names:
        raise UsageError("--tasks names no task: give one or several, with commas between")
    policy = chosen_policy(args)
    from harness.progress.line import Progress

    options = LmEvalOptions(
        tasks=names,
        settings=settings,
        model_args={"pretrained": args.model, "policy": policy.name},
    )
    own = settings_from_args(args, seed=settings["seed"][2] or 0)
    with open_engine(own, policy) as (engine, text):
        result = evaluate(engine, text, options, Progress())
    print(result.shown)
    for path in result.files:
        print(f"results: {path}")
    return 0


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload (as in lm-eval run)")
    what.add_argument(
        "-t", "--tasks", nargs="+", action="extend", required=True, metavar="TASK",
        help="names, groups, patterns or .yaml files, with commas or spaces between",
    )  # fmt: skip
    what.add_argument("--include_path", metavar="FOLDER", help="folder with task files of your own")
    what.add_argument("-f", "--num_fewshot", type=int, metavar="N", help="examples before each question")
    what.add_argument(
        "-L", "--limit", type=float, metavar="N", help="maximum questions per task, or a fraction"
    )
    what.add_argument(
        "-E", "--samples", metavar="JSON", help="questions by number instead: '{\"task\": [0, 5]}' or a file"
    )
    what.add_argument(
        "--apply_chat_template", nargs="?", const=True, default=False, metavar="NAME",
        help="ask as a chat, in the model's own format",
    )  # fmt: skip
    what.add_argument(
        "--fewshot_as_multiturn", nargs="?", const=True, type=_true, metavar="BOOL",
        help="examples as turns of the chat (default with --apply_chat_template)",
    )  # fmt: skip
    what.add_argument("--system_instruction", metavar="TEXT", help="put before every prompt")
    what.add_argument(
        "--gen_kwargs", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="of generations: until, max_gen_toks, do_sample, temperature, top_p, top_k",
    )  # fmt: skip
    what.add_argument("-x", "--predict_only", action="store_true", help="keep answers, compute no metric")
    what.add_argument(
        "--seed", default="0,1234,1234,1234", metavar="N[,N,N,N]",
        help="of Python, numpy, sampling and example choice (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--metadata", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="for tasks that need it, such as tokenizer=NAME",
    )  # fmt: skip
    what.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="allow tasks that run generated code"
    )


class _Refused(argparse.Action):
    """Refuses a flag and names the one to use instead."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(f"{'/'.join(self.option_strings)} is not available: {self.const}")


def _true(text: str) -> bool:
    return text.lower() in ("true", "1", "yes")


def _seeds(text: str) -> list[int | None]:
    try:
        seeds = [None if part.strip().lower() == "none" else int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if len(seeds) not in (1, 4):
        raise UsageError(f"--seed {text!r} is not one or four whole numbers, such as 0,1234,1234,1234")
    return seeds * 4 if len(seeds) == 1 else seeds
