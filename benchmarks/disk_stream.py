#!/usr/bin/env python
"""Read rate of the engine's disk tier, against the best rate of fio on the same file system.

    python benchmarks/disk_stream.py --folder results/offload --repeats 7
    python benchmarks/disk_stream.py --quick

Rounds alternate: fio with the best of a few settings, which are tried first, then the engine's file. If fio
is not installed, plain direct requests of a few threads replace it, and the table says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page_cache import drop
from benchmarks.rates import DiskRates
from benchmarks.records import RESULTS, RepetitionLog, markdown, say
from benchmarks.script import run
from engine.memory.disk.aligned import empty_aligned
from engine.memory.storage import DiskFile
from engine.units import MIB, parse_bytes
from harness.comparison.ratios import spread

FIO_SETTINGS = [
    (size, depth, jobs) for size in ("4m", "16m") for depth in (1, 2, 4) for jobs in (1, 2)
]  # fmt: skip
PIECES = (4 * MIB, 16 * MIB, 64 * MIB)
"""Bytes of one call: a weight of the 1.3B model has 8 to 32 MiB at 16 bits, a layer, read at once, 96."""

CALLS = (1, 2)
"""Concurrent calls; the stream of the weights makes two."""

_HUGE_PAGES = 128
"""Of 2 MiB: as many as fio's largest setting needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both readers in turn; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("results/offload"))
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("2GiB"))
    parser.add_argument("--seconds", type=float, default=3.0, help="of one fio round")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--quick", action="store_true", help="256 MiB, short rounds, two repeats")
    parser.add_argument("--no-drop-caches", action="store_true", help="drop only the files' own pages")
    parser.add_argument("--out", type=Path, default=RESULTS / "disk_stream.jsonl")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.seconds, options.repeats = 256 * MIB, 0.5, 2
    options.folder.mkdir(parents=True, exist_ok=True)
    log = RepetitionLog(options.out, ("piece", "calls", "size", "repeat"))
    with tempfile.TemporaryDirectory(prefix="disk-stream-", dir=options.folder) as scratch:
        measure(Path(scratch), options, log)
    print(report(log))
    return 0


def measure(folder: Path, options: argparse.Namespace, log: RepetitionLog) -> None:
    """Find fio's best setting, then measure both readers in turn."""
    if shutil.which("fio"):
        tried = {setting: fio(folder, options.size, options.seconds / 2, setting) for setting in FIO_SETTINGS}
        best = max(tried, key=lambda setting: tried[setting])
        reference = "fio bs={} iodepth={} jobs={}".format(*best)
        say(f"{reference}: {tried[best] / 1e6:.0f} MB/s, the best of {len(tried)} settings")

        def other() -> float:
            return fio(folder, options.size, options.seconds, best)

    else:
        alone = DiskRates(folder, options.size)
        reference = f"no fio here: direct requests, threads and MiB {alone.settings['read']}"

        def other() -> float:
            return alone.read(options.seconds)

    file, kind = engine_file(folder / "engine.bin", options.size)
    try:
        for repeat in range(options.repeats):
            for piece, calls in itertools.product(PIECES, CALLS):
                row = {"piece": piece, "calls": calls, "size": options.size, "repeat": repeat}
                if log.has(row):
                    continue
                theirs = other()
                cold = drop([folder], not options.no_drop_caches)
                ours = read_through(file, options.size, piece, calls)
                after = other()
                mean = (theirs + after) / 2
                log.add({**row, "engine": ours, "reference": mean, "before": theirs, "after": after,
                         "ratio": ours / mean, "how": reference, "file": kind, "cold": cold})  # fmt: skip
                say(f"{piece // MIB} MiB, {calls} at once: {ours / 1e6:.0f} of {mean / 1e6:.0f} MB/s")
    finally:
        file.close()


def engine_file(path: Path, size: int) -> tuple[DiskFile, str]:
    """A filled file of the engine's disk tier, and whether it is direct or buffered."""
    file = DiskFile(path, size)
    piece = torch.randint(0, 256, (16 * MIB,), dtype=torch.uint8)
    for offset in range(0, size, len(piece)):
        file.write(offset, piece[: min(len(piece), size - offset)])
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return file, "direct" if getattr(file, "direct", False) else "buffered"


def read_through(file: DiskFile, size: int, piece: int, calls: int) -> float:
    """Read a file once, front to back, into buffers whose pages exist; returns bytes per second.

    Args:
        calls: number of calling threads, each of which reads the next piece.
    """
    offsets = range(0, size - piece + 1, piece)
    turn = itertools.count()  # next() of it is atomic
    buffers = [empty_aligned(piece) for _ in range(calls)]

    def read(into: Tensor) -> None:
        while (place := next(turn)) < len(offsets):
            file.read(offsets[place], into)

    with ThreadPoolExecutor(calls) as threads:
        begin = time.perf_counter()
        list(threads.map(read, buffers))
        return len(offsets) * piece / (time.perf_counter() - begin)


def fio(folder: Path, size: int, seconds: float, setting: tuple[str, int, int]) -> float:
    """Bytes per second of fio's direct sequential reads.

    Raises:
        RuntimeError: with fio's message.
    """
    block, depth, jobs = setting
    command = [
        "fio", "--name=read", f"--directory={folder}", "--filename=fio.bin", f"--size={size}", "--rw=read",
        "--direct=1", "--ioengine=libaio", f"--bs={block}", f"--iodepth={depth}", f"--numjobs={jobs}",
        f"--offset_increment={size // (2 * jobs)}", "--time_based", f"--runtime={seconds}",
        "--group_reporting", "--output-format=json", f"--mem={fio_memory()}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"fio failed: {result.stderr.strip() or result.stdout.strip()}")
    text = result.stdout[result.stdout.index("{") :]
    return float(json.loads(text)["jobs"][0]["read"]["bw_bytes"])


def fio_memory() -> str:
    """Huge pages if enough of them are free (vm.nr_hugepages): small pages make requests slower."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = [line for line in lines if line.startswith("HugePages_Free")]
    return "shmhuge" if free and int(free[0].split()[1]) >= _HUGE_PAGES else "malloc"


def report(log: RepetitionLog) -> str:
    """A table: bytes of a call, calls at once, both rates, ratio."""
    lines = []
    for piece, calls in itertools.product(PIECES, CALLS):
        rows = [row for row in log.rows if (row["piece"], row["calls"]) == (piece, calls)]
        if rows:
            rates = [spread([row[name] / 1e6 for row in rows], 0) for name in ("engine", "reference")]
            ratio = spread([row["ratio"] for row in rows])
            lines.append(
                [f"{piece // MIB} MiB", str(calls), rows[-1]["file"], *rates, ratio, rows[-1]["how"]]
            )
    header = ["a call", "calls at once", "file", "engine MB/s", "reference MB/s", "ratio", "reference"]
    return markdown(header, lines)


if __name__ == "__main__":
    run(main)
