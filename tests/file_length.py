"""Refuses files of ours that are longer than 400 lines: a file is read in one sitting.

Run as a script by ``make check``. Data, lock files and stored results are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

LIMIT = 400
COUNTED = {".py", ".c", ".h", ".cu", ".md", ".toml", ".yaml", ".conf", ".css", ".js", ".sh", ""}
LEFT_OUT = {"results", "site", "build", "dist", "prod_env", "benchmark_output", "LICENSE"}


def counted_files(root: Path) -> Iterator[Path]:
    """Every file below root that the limit holds for; hidden folders are skipped, save .ci."""
    for path in sorted(root.iterdir()):
        if path.name in LEFT_OUT or (path.name.startswith(".") and path.name != ".ci"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from counted_files(path)
        elif path.is_file() and path.suffix in COUNTED:
            yield path


def main() -> int:
    """Print each file that is too long; exit code 1 if there is one."""
    root = Path(__file__).resolve().parent.parent
    files = list(counted_files(root))
    lengths = {path: len(path.read_text(encoding="utf-8", errors="replace").splitlines()) for path in files}
    too_long = {path: length for path, length in lengths.items() if length > LIMIT}
    for path, length in too_long.items():
        print(f"{path.relative_to(root)}: {length} lines, limit {LIMIT}: find the cut that makes it two")
    if not too_long:
        print(f"{len(files)} files, none over {LIMIT} lines")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
