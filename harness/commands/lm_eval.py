"""``run_helm.py lm-eval``: evaluate tasks of lm-evaluation-harness with the engine."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from engine.errors import UsageError
from harness.commands.arguments import add_engine_groups, chosen_policy, open_engine
from harness.commands.flags import SWITCH, Group, add_flag, several
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
    "confirm_run_unsafe_code", "trust_remote_code", "samples",
)  # fmt: skip
"""Flags that are fields of lm-eval's configuration as they are."""

_REFUSED = {
    "-b --batch_size": "the policy says it: --policy NAME,device_batch=N,num_device_batches=N",
    "-a --model_args": "give --model FOLDER_OR_NAME, --policy and --device",
}
"""Flags of lm-eval that have other names here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    _add_task_options(parser.add_argument_group("workload (as in lm-eval run)"))
    add_engine_groups(parser, "--model -M")
    where = parser.add_argument_group("output")
    output = "folder or .json file of the results; default: none kept"
    add_flag(where, "-o --output_path", output, metavar="PATH")
    add_flag(where, "-s --log_samples", "keep every sample beside the results", SWITCH)
    add_flag(where, "-c --use_cache", "data base of answers to keep and to reuse", metavar="PATH")
    add_flag(where, "-w --write_out", "print the first prompts of each task", SWITCH)
    add_flag(where, "--show_config", "print all results and settings as JSON", SWITCH)
    for flags, cure in _REFUSED.items():
        add_flag(parser, flags, argparse.SUPPRESS, nargs="*", action=_Refused, const=cure)


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
    settings["seed"] = _seeds(args.seed)
    names = [name for text in args.tasks for name in text.split(",") if name]
    if not names:
        raise UsageError("--tasks names no task: give one or several, with commas between")
    policy = chosen_policy(args)
    from harness.progress.line import Progress

    options = LmEvalOptions(names, settings, {"pretrained": args.model, "policy": policy.name})
    own = settings_from_args(args, seed=settings["seed"][2] or 0)
    with open_engine(own, policy) as (engine, text):
        result = evaluate(engine, text, options, Progress())
    print(result.shown)
    for path in result.files:
        print(f"results: {path}")
    return 0


def _add_task_options(group: Group) -> None:
    tasks = "names, groups, patterns or .yaml files, with commas or spaces between"
    add_flag(group, "-t --tasks", tasks, several("TASK"), required=True)
    add_flag(group, "--include_path", "folder with task files of your own", metavar="FOLDER")
    add_flag(group, "-f --num_fewshot", "examples before each question", type=int, metavar="N")
    add_flag(group, "-L --limit", "maximum questions per task, or a fraction", type=float, metavar="N")
    samples = "questions by number instead: '{\"task\": [0, 5]}' or a file"
    add_flag(group, "-E --samples", samples, metavar="JSON")
    chat = "ask as a chat, in the model's own format"
    add_flag(group, "--apply_chat_template", chat, nargs="?", const=True, default=False, metavar="NAME")
    turns = "examples as turns of the chat (default with --apply_chat_template)"
    add_flag(group, "--fewshot_as_multiturn", turns, nargs="?", const=True, type=_true, metavar="BOOL")
    add_flag(group, "--system_instruction", "put before every prompt", metavar="TEXT")
    generation = "of generations: until, max_gen_toks, do_sample, temperature, top_p, top_k"
    add_flag(group, "--gen_kwargs", generation, several("KEY=VALUE"))
    add_flag(group, "-x --predict_only", "keep answers, compute no metric", SWITCH)
    seeds = "of Python, numpy, sampling and example choice"
    add_flag(group, "--seed", seeds, default="0,1234,1234,1234", metavar="N[,N,N,N]")
    metadata = "for tasks that need it, such as tokenizer=NAME"
    add_flag(group, "--metadata", metadata, several("KEY=VALUE"))
    add_flag(group, "--confirm_run_unsafe_code", "allow tasks that run generated code", SWITCH)


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
