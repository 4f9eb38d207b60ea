"""``run_helm.py run``: evaluate a model on HELM run entries under one or more policies."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import PolicyError, UsageError
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.units import parse_bytes

if TYPE_CHECKING:
    from harness.options import SuiteOptions

SCENARIOS = Path(__file__).resolve().parent.parent.parent / "scenarios"
DEMO_MODEL = SCENARIOS / "demo" / "model"
DEMO_NAME = "tierbench-demo"
DEMO_ENTRIES = SCENARIOS / "run_entries_demo.conf"
DEMO_POLICIES = ("resident", "offloaded", "offloaded-4bit")
DEMO_INSTANCES = 25
POLICY_FILE = SCENARIOS / "policies.yaml"

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
      --policy offloaded offloaded,weight_bits=4 --device-memory 15GiB --host-memory 48GiB -m 100

  # speed alone, with made-up weights, half of them on disk, settings kept in a file
  run_helm.py run --random-weights --policy name=half,weights=0.5/0/0.5 -r form_processing -m 20 \\
      --suite speed --print-config > speed.yaml    # then: run_helm.py run --config speed.yaml
"""


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="evaluate a model on HELM run entries under one or more policies",
        description=textwrap.fill(DESCRIPTION, 100),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is asked (as in helm-run)")
    what.add_argument(
        "-r",
        "--run-entries",
        nargs="+",
        action="extend",
        default=[],
        metavar="ENTRY",
        help="name:key=value,...",
    )
    what.add_argument(
        "-c",
        "--conf-paths",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="files of run entries",
    )
    what.add_argument(
        "-m", "--max-eval-instances", type=_positive, metavar="N",
        help=f"most evaluation instances per run entry; default: all ({DEMO_INSTANCES} of the demo's)",
    )  # fmt: skip
    what.add_argument("-t", "--num-train-trials", type=_positive, metavar="N", help="draws of examples")
    what.add_argument(
        "--truncate", choices=("right", "forbid"), default="right",
        help="prompts longer than the window: drop in-context examples and then cut as HELM does, or refuse",
    )  # fmt: skip
    what.add_argument(
        "--plugins", nargs="+", action="extend", default=[], metavar="MODULE",
        help="modules or files that register more HELM scenarios",
    )  # fmt: skip
    who = parser.add_argument_group("who answers")
    who.add_argument(
        "--model", metavar="FOLDER_OR_NAME", help="local folder or hub name; default: demo model"
    )
    who.add_argument("--model-name", metavar="NAME", help="how tables call it; default: its folder's name")
    who.add_argument(
        "--policy", nargs="+", action="extend", default=[], metavar="POLICY",
        help="names from the policy file, or key=value,...; default: " + " ".join(DEMO_POLICIES),
    )  # fmt: skip
    who.add_argument(
        "--policy-file", type=Path, default=POLICY_FILE, metavar="FILE", help="default: %(default)s"
    )
    who.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or pretend (default: auto)")
    who.add_argument("--random-weights", action="store_true", help="make up the weights: throughput only")
    who.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    who.add_argument("--seed", type=int, default=0, help="of sampling and random weights (default: 0)")
    budget = parser.add_argument_group("memory (sizes such as 16GiB; default: all that is free)")
    budget.add_argument("--device-memory", type=_size, metavar="SIZE", help="most bytes of the device tier")
    budget.add_argument("--host-memory", type=_size, metavar="SIZE", help="most bytes of the host tier")
    budget.add_argument("--disk", type=_size, metavar="SIZE", help="most bytes of the disk tier")
    budget.add_argument(
        "--offload-dir", type=Path, metavar="FOLDER", help="of the disk tier (OUTPUT/offload)"
    )
    where = parser.add_argument_group("where results go")
    where.add_argument("--suite", help="name of the suite; default: default, or demo for the demo")
    where.add_argument(
        "-o",
        "--output-path",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    where.add_argument(
        "--local-path", type=Path, default=Path("prod_env"), metavar="FOLDER",
        help="HELM's configuration folder, where the model is entered; default: %(default)s",
    )  # fmt: skip
    where.add_argument("-d", "--dry-run", action="store_true", help="only say what would be asked and held")
    where.add_argument("--no-report", action="store_true", help="write no report")
    parser.set_defaults(execute=execute, what_runs=what_runs)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run the suite, print its table, write its report.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    from harness.commands.report import print_report
    from harness.run import run_suite
    from harness.store import SuiteStore

    options = make_options(args)
    result = run_suite(options)
    print(result.shown)
    if options.dry_run:
        return 0
    print(f"results: {result.folder}")
    print(f"to browse: helm-summarize --suite {options.suite} -o {options.output_path}, then helm-server")
    if options.report and result.rows:
        print_report(SuiteStore(options.output_path, options.suite))
    for failure in result.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if result.failures else 0


def make_options(args: argparse.Namespace) -> SuiteOptions:
    """Fill in what was not given.

    Raises:
        PolicyError: for an unknown or malformed policy or policy file.
    """
    from harness.options import SuiteOptions

    own_entries = bool(args.run_entries or args.conf_paths)
    is_demo = not (own_entries or args.model or args.policy)
    known = read_policies(args.policy_file)
    model = args.model or str(DEMO_MODEL)
    return SuiteOptions(
        model=model,
        model_name=args.model_name or (_model_name(model) if args.model else DEMO_NAME),
        policies=[Policy.parse(policy, known) for policy in args.policy or DEMO_POLICIES],
        suite=args.suite or ("demo" if is_demo else "default"),
        output_path=args.output_path,
        run_entries=args.run_entries,
        conf_paths=args.conf_paths if own_entries else [str(DEMO_ENTRIES)],
        max_eval_instances=args.max_eval_instances or (None if own_entries else DEMO_INSTANCES),
        num_train_trials=args.num_train_trials,
        budgets=Budgets(args.device_memory, args.host_memory, args.disk),
        offload_dir=args.offload_dir,
        device=args.device,
        seed=args.seed,
        weights="random" if args.random_weights else "trained",
        trust_remote_code=args.trust_remote_code,
        forbid_truncation=args.truncate == "forbid",
        plugins=args.plugins,
        local_path=args.local_path,
        dry_run=args.dry_run,
        report=not args.no_report,
    )


def what_runs(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were not given and depend on others, as they will be; for ``--print-config``.

    Raises:
        PolicyError: for an unknown or malformed policy or policy file.
    """
    options = make_options(args)
    return {
        "model": options.model,
        "model_name": options.model_name,
        "policy": args.policy or list(DEMO_POLICIES),
        "suite": options.suite,
        "conf_paths": list(options.conf_paths),
        "max_eval_instances": options.max_eval_instances,
        "offload_dir": options.offload_dir or options.output_path / "offload",
    }


def read_policies(path: Path) -> dict[str, Policy]:
    """Read a policy file: YAML, a mapping from names to mappings of a policy's keys.

    Raises:
        UsageError: if the file is missing.
        PolicyError: if it or a policy in it is malformed.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the policy file {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise PolicyError(f"the policy file {path} is not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise PolicyError(f"the policy file {path} must map names to mappings such as 'weights: 0.2/0.3/0.5'")
    return {str(name): Policy.from_mapping({"name": str(name)} | value) for name, value in content.items()}


def _model_name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.is_dir() else model.rsplit("/", 1)[-1]


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
