"""``run_helm.py report``: write the report of a suite that was run before."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from harness.store import SuiteStore

EPILOG = """\
examples:
  # the demo's
  run_helm.py report --suite demo

  # of a suite whose results are elsewhere; the report goes there too
  run_helm.py report --suite opt30b --output-path /data/results

  # the folder kept in a file that holds the line output-path: /data/results
  run_helm.py report --suite opt30b --config report.yaml
"""


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="write a finished suite's report",
        description="Write the report of a suite that was run before: one HTML page, and Markdown.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", required=True, help="name of the suite")
    parser.add_argument(
        "-o", "--output-path", type=Path, default=Path("results"), help="default: %(default)s"
    )
    parser.set_defaults(execute=execute)
    return parser


def execute(args: argparse.Namespace) -> int:
    """Write the report and say where it is.

    Raises:
        UsageError: if the suite has no results.
    """
    folder = args.output_path / "runs" / args.suite
    if not (folder / "table.json").is_file():
        raise UsageError(f"{folder} holds no finished suite: first run_helm.py run --suite {args.suite}")
    print_report(SuiteStore(args.output_path, args.suite))
    return 0


def print_report(store: SuiteStore) -> None:
    """Write a suite's report and print where it is."""
    from harness.report import write_report

    written = write_report([store.folder], store.reports, store.output_path)
    print(f"report: {written.html} and {written.markdown}")
