"""``run_helm.py profile``: measure this machine, for plans and predictions."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.flags import FILE, FOLDER, SWITCH, add_flag, number, some
from harness.engines.auto import PROFILES

DESCRIPTION = (
    "Measure what this machine can do: how much each tier holds, how fast bytes move between them, how "
    "fast the engine multiplies, attends, packs and unpacks, what a pass takes besides, and how much moving "
    "and computing slow each other. Takes about two minutes on a quiet machine and writes a file that plan, "
    "throughput and --policy auto read."
)

EPILOG = """\
examples:
  # measure the CPU, with the disk below results/offload
  run_helm.py profile --device cpu

  # fewer points in a quarter of the time, into a file of your own
  run_helm.py profile --quick --output results/profiles/quick.json

  # a GPU, and the disk that will hold what is offloaded
  run_helm.py profile --device cuda --offload-dir /data/offload
"""

SECONDS, QUICK_SECONDS = 60.0, 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_flag(parser, "--device", "auto, cpu, cuda, cuda:N or pretend", default="auto", type=some)
    disk = "of the disk tier, which is measured there"
    add_flag(parser, "--offload-dir", disk, FOLDER, Path("results/offload"))
    add_flag(parser, "-o --output", f"default: {PROFILES}/, named after processor and device", FILE)
    effort = parser.add_mutually_exclusive_group()
    add_flag(effort, "--quick", f"about {QUICK_SECONDS:.0f} seconds, fewer points", SWITCH)
    add_flag(
        effort, "--seconds", metavar="N",
        type=number(lambda value: 0 < value < 3600, "a number of seconds above 0 and below 3600"),
        text="about how long to measure; below 30 with fewer points, below 5 with hardly any; "
        f"default: {SECONDS:.0f}",
    )  # fmt: skip


def execute(args: argparse.Namespace) -> int:
    """Measure, write the file, print a table."""
    from engine.profiler import measure_profile
    from harness.progress.line import Progress
    from harness.throughput.profile_table import to_text

    progress = Progress()
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    profile = measure_profile(
        args.device,
        args.offload_dir,
        seconds=seconds,
        on_step=lambda what: progress.say(f"measuring {what}"),
    )
    path = args.output or PROFILES / f"{profile.name}.json"
    profile.save(path)
    print(to_text(profile))
    print(f"profile: {path}")
    return 0
