#!/usr/bin/env python
"""The pictures and tables of the documents, made from committed results so that none is stale.

    python benchmarks/pictures.py            # docs/pictures/*.svg, the measured rows in README.md
    python benchmarks/pictures.py --demo     # before that, the demo's tables from results/runs/demo

The second wants `python run_helm.py` to have been run on a quiet machine. Nothing is measured here. A test
draws everything again and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.documents.architecture import draw_architecture
from benchmarks.documents.figures import draw_demo, draw_offloaders, draw_pass
from benchmarks.documents.tables import ROOT, batch_fields, between, demo_summary, measured_table

PICTURES = {
    "pass.svg": draw_pass,
    "offloaders.svg": draw_offloaders,
    "architecture.svg": draw_architecture,
    "demo.svg": draw_demo,
}
FOLDER = ROOT / "docs" / "pictures"
README, DEMO = ROOT / "README.md", ROOT / "docs" / "demo.md"
FRONT_ENDS = ROOT / "docs" / "front_ends.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", action="store_true", help="also the demo's tables")
    parser.add_argument("--suite", type=Path, default=ROOT / "results" / "runs" / "demo", metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.demo:
        stored = json.loads((options.suite / "table.json").read_text(encoding="utf-8"))
        table = (options.suite / "table.md").read_text(encoding="utf-8").strip()
        DEMO.write_text(between(DEMO.read_text(encoding="utf-8"), "demo table", table))
        summary = demo_summary(stored["rows"], stored["peaks"])
        README.write_text(between(README.read_text(encoding="utf-8"), "demo summary", summary))
    README.write_text(between(README.read_text(encoding="utf-8"), "measured rows", measured_table()))
    FRONT_ENDS.write_text(between(FRONT_ENDS.read_text(encoding="utf-8"), "batch fields", batch_fields()))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
