"""``run_helm.py run``: evaluate a model on HELM run entries under one or more policies."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.commands.arguments import (
    POLICY_FILE,
    SCENARIOS,
    add_chat,
    add_entry_options,
    add_format_options,
    add_memory_group,
    add_model_group,
    add_output_path,
    options_from_args,
    parse_policy,
    read_policies,
)
from harness.commands.flags import COUNT, FILE, FOLDER, SWITCH, add_flag, several, some
from harness.engines.settings import settings_from_args
from harness.escape import plain

if TYPE_CHECKING:
    from harness.suite.options import SuiteOptions

DEMO_MODEL = SCENARIOS / "demo" / "model"
DEMO_NAME = "tierbench-demo"
DEMO_ENTRIES = SCENARIOS / "run_entries_demo.conf"
DEMO_POLICIES = ("resident", "offloaded", "offloaded-4bit")
DEMO_INSTANCES = 50

DESCRIPTION = (
    "Evaluate a model on HELM run entries under one or more policies. What is not given is the demo's: its "
    "model, its run entries, its policies. A suite that was interrupted continues when the same command is "
    "given again."
)

EPILOG = """\
examples:
  # ten questions of one scenario, everything on the device
  run_helm.py run --run-entries information_extraction -m 10 --policy resident --suite first

  # what the paper's run entries would ask of a model, and what two policies would hold; nothing is loaded
  run_helm.py run --dry-run --model facebook/opt-30b --conf-paths scenarios/run_entries_paper.conf \\
      --policy offloaded offloaded,weight_quant=4 --device-memory 15GiB --host-memory 48GiB -m 100

  # speed alone, with random weights, half of them on disk, settings kept in a file
  run_helm.py run --random-weights --policy name=half,weights=0.5/0/0.5 -r form_processing -m 20 \\
      --suite speed --print-config > speed.yaml    # then: run_helm.py run --config speed.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    what = parser.add_argument_group("workload (as in helm-run)")
    add_entry_options(what, DEMO_INSTANCES)
    add_flag(what, "-t --num-train-trials", "draws of in-context examples", COUNT)
    add_flag(
        what, "--truncate", choices=("right", "forbid"), default="right",
        text="prompts longer than the window: drop in-context examples and then cut as HELM does, or refuse",
    )  # fmt: skip
    add_chat(what)
    add_flag(what, "--seed", "of sampling and random weights", type=int, default=0)
    add_model_group(parser, default="the demo model")
    how = parser.add_argument_group("policy")
    add_flag(
        how, "--policy", kind=several("POLICY"),
        text="names from the policy file, key=value,..., or auto for what the planner finds; default: "
        f"{' '.join(DEMO_POLICIES)}, or all of another --policy-file",
    )  # fmt: skip
    add_flag(how, "--policy-file", "", FILE, POLICY_FILE)
    add_format_options(how)
    accepted = "refuse policies whose compression this curve.json (see curve) has not accepted"
    add_flag(how, "--only-accepted", accepted, FILE)
    add_memory_group(parser, "OUTPUT/offload")
    where = parser.add_argument_group("output")
    add_flag(where, "--suite", "name of the suite; default: default, or demo for the demo", type=some)
    add_output_path(where)
    configuration = "HELM's configuration folder, to which the model is added"
    add_flag(where, "--local-path", configuration, FOLDER, Path("prod_env"))
    add_flag(where, "-d --dry-run", "only show the requests and the memory they would take", SWITCH)
    add_flag(where, "-q --quiet", "show no progress", SWITCH)
    add_flag(where, "--no-report", "write no report", SWITCH)


def execute(args: argparse.Namespace) -> int:
    """Run the suite, print its table, write its report."""
    from harness.commands.report import make_report
    from harness.suite.runner import run_suite

    options = make_options(args)
    result = run_suite(options)
    print(result.shown)
    if options.dry_run:
        return 0
    print(f"results: {result.folder}")
    chosen = shlex.join(["--suite", options.suite, "-o", str(options.output_path)])
    print(f"to browse: PYTHONPATH=. helm-summarize {chosen} --auto-generate-schema && helm-server {chosen}")
    if options.report and result.rows:
        make_report(options.output_path, [options.suite], result.reports)
    for failure in result.failures:
        print(f"error: {plain(failure)}", file=sys.stderr)
    return 1 if result.failures else 0


def make_options(args: argparse.Namespace) -> SuiteOptions:
    """Fill in what was not given.

    Raises:
        PolicyError: for an unknown or malformed policy or policy file.
    """
    from harness.suite.options import SuiteOptions

    args = argparse.Namespace(**vars(args) | _with_defaults(args))
    known = read_policies(args.policy_file)
    return options_from_args(
        SuiteOptions,
        args,
        settings=settings_from_args(args),
        policies=[parse_policy(policy, known, args) for policy in args.policy],
        forbid_truncation=args.truncate == "forbid",
        report=not args.no_report,
    )


def what_runs(args: argparse.Namespace) -> dict[str, Any]:
    """The values of flags that were not given and depend on others, for ``--print-config``."""
    make_options(args)  # a wrong policy shows here, too
    return _with_defaults(args)


def _with_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Values for flags that were not given: the demo's, or all policies of another file than the bundled."""
    own_entries = bool(args.run_entries or args.conf_paths)
    own_file = args.policy_file.resolve() != POLICY_FILE
    is_demo = not (own_entries or args.model or args.policy or own_file)
    model = Path(args.model or DEMO_MODEL)
    name = model.resolve().name if model.is_dir() else model.name
    return {
        "model": str(args.model or DEMO_MODEL),
        "model_name": args.model_name or (name if args.model else DEMO_NAME),
        "policy": args.policy or list(read_policies(args.policy_file) if own_file else DEMO_POLICIES),
        "suite": args.suite or ("demo" if is_demo else "default"),
        "conf_paths": args.conf_paths if own_entries else [str(DEMO_ENTRIES)],
        "max_eval_instances": args.max_eval_instances or (None if own_entries else DEMO_INSTANCES),
        "offload_dir": args.offload_dir or args.output_path / "offload",
    }
