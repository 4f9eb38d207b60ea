#!/usr/bin/env python
"""How close passes come to the machine's limits: bound / measured time, per setting and kind of pass.

    python benchmarks/limits.py --quick                      # tiny shape, to see that it runs
    python benchmarks/limits.py --only 1.3b --minutes 15
    python benchmarks/limits.py --only '6.7b:weights on disk' --layers 8
    python benchmarks/limits_report.py                       # table and plot

The bound is the largest, over all streams, of the stream's work divided by its rate alone, which is measured
right before and after each repetition in the same process. Every repetition is appended to a file at once;
started again, the script continues where it stopped. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cells import BLOCKS, SETTINGS, WEIGHT, block_of
from benchmarks.records import RESULTS, Eta, say
from benchmarks.script import run
from benchmarks.synthetic import TINY, checkpoint

SHAPES = ("125m", "1.3b", "6.7b")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every group (shape and setting) in a process of its own; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="only groups with this in their SHAPE:SETTING"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="tiny shape, small blocks, two repeats")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers of each shape")
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="as in 1x1,16x1,32x2")
    parser.add_argument("--prompts", default="128,512", help="prompt lengths; 512 serves two loads")
    parser.add_argument("--minutes", type=float, default=45, metavar="M", help="for all groups together")
    parser.add_argument("--prefill-seconds", type=float, metavar="S", help="longest predicted prefill pass")
    parser.add_argument("--work", type=Path, default=Path("results/offload/limits"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS / "limits.jsonl", metavar="FILE")
    parser.add_argument("--no-drop-caches", action="store_true", help="drop only the files' own pages")
    parser.add_argument("--check-filled", action="store_true", help="also decode after real prompts")
    parser.add_argument("--worker", nargs=2, metavar=("SHAPE", "SETTING"), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.blocks, options.repeats, options.prompts = "4x1", 2, "128"
    if options.worker:
        from benchmarks.limits_worker import measure_group

        return measure_group(options)
    for block in options.blocks.split(","):
        block_of(block)
    shapes = (TINY,) if options.quick else SHAPES
    groups = [
        (shape, setting) for shape in shapes for setting in SETTINGS if options.only in f"{shape}:{setting}"
    ]
    if not groups:
        print(f"error: --only {options.only!r} matches none of {', '.join(shapes)} x {list(SETTINGS)}")
        return 2
    return _run_groups(groups, options, list(arguments if arguments is not None else sys.argv[1:]))


def _run_groups(groups: Sequence[tuple[str, str]], options: argparse.Namespace, arguments: list[str]) -> int:
    eta = Eta([WEIGHT[shape] for shape, _ in groups])
    end = time.monotonic() + 60 * options.minutes
    failed = 0
    for number, (shape, setting) in enumerate(groups):
        checkpoint(options.work, shape, options.layers)
        left = sum(WEIGHT[other] for other, _ in groups[number:])
        share = max(end - time.monotonic(), 0) * WEIGHT[shape] / left
        say(f"{shape}, {setting}: {share / 60:.1f} minutes")
        command = [sys.executable, __file__, *arguments, "--worker", shape, setting]
        result = subprocess.run([*command, "--until", str(time.time() + share)], check=False)
        if result.returncode:
            failed += 1
            say(f"{shape}, {setting}: ended with {result.returncode}")
        say(f"{number + 1} of {len(groups)} groups; {eta.step(WEIGHT[shape])}")
    say(f"table: python benchmarks/limits_report.py {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
