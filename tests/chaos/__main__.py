"""``python -m tests.chaos``: a seeded campaign of kills, signals, corruption, full disks and fuzzing."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.campaign import Campaign
from tests.chaos.corruption import corruptions
from tests.chaos.fuzz import fuzz
from tests.chaos.kills import kills, pairs, signals
from tests.chaos.limits import full_disks, memory

# What runs, how many cases the whole campaign has, and the share of its time that a part may take.
PARTS = {
    "fuzz": (fuzz, 20_000, 0.1),
    "memory": (memory, 18, 0.1),
    "corruptions": (corruptions, 150, 0.2),
    "disks": (full_disks, 24, 0.1),
    "signals": (signals, 30, 0.1),
    "pairs": (pairs, 10, 0.05),
    "kills": (kills, 200, 1.0),
}


def main() -> int:
    """Run the campaign, print its counts, and fail where any case did."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--minutes", type=float, default=60, help="no case begins after these (default: 60)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the whole campaign's cases (default: 1)"
    )
    parser.add_argument("--folder", type=Path, help="working folders; those of failed cases stay in it")
    parser.add_argument("--out", type=Path, help="counts and failures as JSON")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    campaign = Campaign(folder, options.seed, began + 60 * options.minutes)
    for name in options.parts:
        part, count, share = PARTS[name]
        left = began + 60 * options.minutes - time.monotonic()
        campaign.ends = time.monotonic() + left * (share if len(options.parts) > 1 else 1.0)
        part(campaign, max(1, round(count * options.scale)))
        print(f"{name}: {time.monotonic() - began:.0f} s since the start", file=sys.stderr, flush=True)
    print(campaign.table())
    print(
        f"seed {options.seed}, {(time.monotonic() - began) / 60:.1f} minutes, {len(campaign.failures)} failed"
    )
    if options.out:
        counts = [
            {"part": part, "kind": kind, "cases": count} for (part, kind), count in campaign.counts.items()
        ]
        options.out.write_text(json.dumps({"counts": counts, "failures": campaign.failures}, indent=1) + "\n")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
