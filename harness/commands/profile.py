"""``run_helm.py profile``: measure this machine, for plans and predictions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.commands.arguments import add_command, some

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
FOLDER = Path("results/profiles")


def register(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "profile", "measure this machine, for plans and predictions", DESCRIPTION, EPILOG, execute
    )
    parser.add_argument(
        "--device",
        type=some,
        default="auto",
        help="auto, cpu, cuda, cuda:N or pretend (default: %(default)s)",
    )
    parser.add_argument(
        "--offload-dir", type=Path, default=Path("results/offload"), metavar="FOLDER",
        help="of the disk tier, which is measured there (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"default: {FOLDER}/, named after processor and device",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--quick", action="store_true", help=f"about {QUICK_SECONDS:.0f} seconds, fewer points"
    )
    effort.add_argument(
        "--seconds", type=_seconds, metavar="N",
        help=f"about how long to measure; below 30 with fewer points, below 5 with hardly any "
        f"(default: {SECONDS:.0f})",
    )  # fmt: skip
    return parser


def execute(args: argparse.Namespace) -> int:
    """Measure, write the file, print a table.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    from engine.errors import UsageError
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
    path = args.output or FOLDER / f"{profile.name}.json"
    try:
        profile.save(path)
    except OSError as error:
        raise UsageError(f"the profile {path} cannot be written: {error.strerror or error}") from error
    print(to_text(profile))
    print(f"profile: {path}")
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and below 3600")
    return seconds
