"""``run_helm.py paper``: the FlexGen paper's published figures beside our simulations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.commands.flags import FOLDER, SWITCH, add_flag, some

DESCRIPTION = (
    "Set every published figure of the FlexGen paper beside a simulation of FlexGen's own setting on its own "
    "runtime, and for the 18 cells of its throughput tables beside what the planner finds for the same "
    "requests. Writes Markdown, JSON and a picture. Nothing is measured and nothing is fitted to the figures."
)

EPILOG = """\
examples:
  # all tables on the paper's machine, with the planner's policies; takes some minutes
  run_helm.py paper

  # without the planner's policies: seconds
  run_helm.py paper --no-plan --output results/paper-quick

  # what FlexGen's settings would do on another card
  run_helm.py paper --no-plan --profile rtx3090 --output results/paper-3090
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    machine = "machine: t4 (the paper's), rtx3090, a6000, h200, or a profile's file"
    add_flag(parser, "--profile", machine, default="t4", type=some, metavar="NAME_OR_FILE")
    add_flag(parser, "--no-plan", "find no policies, simulate FlexGen's only", SWITCH)
    add_flag(parser, "-o --output", "of paper.md, paper.json and paper.svg", FOLDER, Path("results/paper"))


def execute(args: argparse.Namespace) -> int:
    """Simulate, write, and print the cells."""
    from engine.errors import UsageError
    from engine.files.whole import write_whole
    from engine.planner import find_profile
    from harness.progress.line import Progress
    from harness.throughput import paper
    from harness.throughput.paper_plot import draw

    profile = find_profile(args.profile)
    if profile.unified:
        raise UsageError(
            f"profile {profile.name} has no accelerator: FlexGen's settings want one, such as t4"
        )
    progress = Progress()
    published = paper.read_published()
    progress.begin("published figures", len(published))
    rows = paper.simulate_rows(published, profile, not args.no_plan, progress.update)
    progress.end()
    write_whole(args.output / "paper.md", paper.to_markdown(rows, profile))
    write_whole(args.output / "paper.json", json.dumps(paper.to_json(rows, profile), indent=1) + "\n")
    write_whole(args.output / "paper.svg", draw(rows, profile.name))
    cells = [row for row in rows if paper.is_cell(row)]
    print(paper.to_markdown(cells, profile))
    print(f"geometric-mean error {paper.error_of(cells):.3f}; all tables: {args.output / 'paper.md'}")
    return 0
