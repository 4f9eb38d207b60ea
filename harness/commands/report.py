"""``run_helm.py report``: write the report of suites that were run before."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UsageError
from engine.files.names import check_folder_name
from harness.commands.arguments import add_output_path
from harness.commands.flags import SWITCH, add_flag, several

DESCRIPTION = (
    "Write the report of finished suites: one self-contained HTML page, Markdown, pictures, and every "
    "figure as CSV and Parquet. A curve with the name of a suite is included. With --compare: what changed "
    "between two suites, on one screen."
)

EPILOG = """\
examples:
  # the demo's, then open it in a browser: served on this machine only
  run_helm.py report --suite demo
  run_helm.py report --suite demo --serve --port 8000

  # two suites side by side, and a comparison with other offloaders
  run_helm.py report --suite opt30b opt30b-disk --comparison half-ram --output-path /data/results

  # what changed since last week's run
  run_helm.py report --compare opt30b-last-week opt30b

  # the folder kept in a file that holds the line output-path: /data/results
  run_helm.py report --suite opt30b --config report.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_flag(parser, "--suite", "suites to report; several are shown side by side", several("NAME"))
    others = "comparisons with other offloaders to show, with suites or alone"
    add_flag(parser, "--comparison", others, several("NAME"))
    changed = "say what changed between two suites instead"
    add_flag(parser, "--compare", changed, nargs=2, default=[], metavar=("BEFORE", "AFTER"))
    add_flag(parser, "--serve", "serve the report on 127.0.0.1 until interrupted", SWITCH)
    add_flag(parser, "--port", "for --serve; 0: any", type=int, default=8000)
    add_output_path(parser)


def execute(args: argparse.Namespace) -> int:
    """Write the report and say where it is.

    Raises:
        UsageError: if a suite has no results, or flags do not go together.
    """
    if args.compare:
        if args.suite or args.comparison or args.serve:
            raise UsageError("--compare stands alone: leave --suite, --comparison and --serve out")
        return _compare(args.output_path, *args.compare)
    if not args.suite and not args.comparison:
        raise UsageError("nothing to report: give --suite, --comparison or --compare")
    names = list(dict.fromkeys([*args.suite, *args.comparison]))
    for name in names:
        check_folder_name("suite", name)
    suites = list(dict.fromkeys(args.suite))
    folder = args.output_path / "reports" / "+".join(suites or names)
    make_report(args.output_path, suites, folder, list(dict.fromkeys(args.comparison)))
    if args.serve:
        from harness.report.serve import serve

        serve(folder, args.port)
    return 0


def _compare(results: Path, before: str, after: str) -> int:
    from harness.report.changes import changes, write_changes

    for name in (before, after):
        check_folder_name("suite", name)
    runs = results / "runs"
    found = changes(runs / before, runs / after)
    path = results / "reports" / f"{before}..{after}" / "changes.md"
    write_changes(found, path)
    print(found.text(), end="")
    print(f"as Markdown: {path}")
    return 0


def make_report(
    output_path: Path, suites: Sequence[str], folder: Path, comparisons: Sequence[str] = ()
) -> None:
    """Write a report into a folder and print where it is."""
    from harness.report.write import write_report

    written = write_report(output_path, suites, folder, comparisons)
    print(f"report: {written.html} and {written.markdown}; every figure: {written.csv} and .parquet")
