"""``run_helm.py baselines``: show, install and remove the environments of other systems."""

from __future__ import annotations

import argparse
import sys
import textwrap

from engine.errors import UsageError
from engine.units import format_bytes
from harness.baselines import registry
from harness.baselines.sandbox import environments
from harness.text_table import markdown_table

DESCRIPTION = (
    "Systems that compare sets beside the engine. Each has an environment of its own, made from pinned "
    "versions, so that its packages never meet ours. list shows them, install makes an environment, path "
    "prints its folder, remove deletes it. The folder is tierbench/baselines in the user's cache folder, or "
    "what TIERBENCH_BASELINES names."
)

EPILOG = """\
examples:
  # what can be compared, and what is installed
  run_helm.py baselines list

  # llama.cpp, built for this processor
  run_helm.py baselines install llama-cpp

  # why a system is run as it is
  run_helm.py baselines explain accelerate
"""

ACTIONS = ("list", "install", "remove", "path", "explain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    names = "systems; for list all if none are named"
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=names)


def execute(args: argparse.Namespace) -> int:
    """Do what was asked; 1 if an installation failed.

    Raises:
        UsageError: for an unknown system, or one that cannot be installed.
        StorageError: if an environment cannot be removed.
    """
    if args.action == "list":
        _list(args.names or list(registry.NAMES))
        return 0
    if args.action == "path" and not args.names:
        print(environments.root())
        return 0
    if not args.names:
        raise UsageError(
            f"baselines {args.action} wants the name of a system, as run_helm.py baselines list has it"
        )
    failed = 0
    for name in args.names:
        environment = environments.environment_of(registry.get(name))
        if args.action == "path":
            print(environment.folder)
        elif args.action == "explain":
            print(_explained(name))
        elif args.action == "remove":
            print(f"{name}: {'removed' if environments.remove(environment) else 'there was none'}")
        else:
            try:
                environments.install(environment, lambda text: print(text, file=sys.stderr, flush=True))
            except environments.InstallError as error:
                print(f"error: {error}", file=sys.stderr)
                failed = 1
                continue
            stamp = environment.stamp or {}
            print(f"{name}: ready in {environment.folder} ({format_bytes(stamp.get('bytes', 0))})")
    return failed


def _list(names: list[str]) -> None:
    rows = [("name", "system", "configurations", "devices", "environment", "size")]
    for name in names:
        baseline = registry.get(name)
        environment = environments.environment_of(baseline)
        stamp = environment.stamp or {}
        state = "cannot be run" if baseline.not_run else environment.state
        rows.append((
            name, baseline.title, ", ".join(baseline.configurations), ", ".join(baseline.devices), state,
            format_bytes(stamp["bytes"]) if "bytes" in stamp and not environment.own else "-",
        ))  # fmt: skip
    print("\n".join(markdown_table(rows, left=5)))
    print(f"\nenvironments are in {environments.root()}")


def _explained(name: str) -> str:
    baseline = registry.get(name)
    lines = [f"{name}: {baseline.title}", "", textwrap.fill(baseline.choices, 100), ""]
    if baseline.not_run:
        lines += [textwrap.fill(f"Not run: {baseline.not_run}", 100), ""]
    lines += [f"  {key} = {value}" for key, value in baseline.defaults.items()]
    lines += [
        f"  requires {requirement}" for requirement in (*baseline.requirements, *baseline.later_requirements)
    ]
    return "\n".join(lines)
