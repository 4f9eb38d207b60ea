#!/usr/bin/env python
"""The gain of overlapping, time and memory as requests grow, and the overhead of our own Python.

    python benchmarks/overlap.py balance --shape 1.3b        # overlapped against sequential walk
    python benchmarks/overlap.py flat --shape 125m           # 1 to 16 times the requests
    python benchmarks/overlap.py overhead --shape 1.3b       # also: --shape demo
    python benchmarks/overlap.py balance --quick

Every repetition is appended to a file of JSON lines; started again, the script continues.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page_cache import drop
from benchmarks.passes import past_filled, set_block, timed
from benchmarks.python_time import KINDS, profile_passes
from benchmarks.records import RESULTS, RepetitionLog, markdown, say
from benchmarks.script import run
from benchmarks.synthetic import checkpoint, own_store, prompts
from engine.engine import Engine
from engine.errors import BudgetError
from engine.spec.policy import Policy, Schedule
from engine.spec.request import Request
from engine.units import format_bytes
from harness.comparison.ratios import spread

DEMO = Path(__file__).resolve().parent.parent / "scenarios" / "demo" / "model"
KEYS = ("what", "shape", "policy", "block", "context", "requests", "repeat")
BLOCKS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192)
FACTORS = (1, 2, 4, 8, 16)
_IO = ("weights", "kv_in", "kv_out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("balance", "flat", "overhead"))
    parser.add_argument("--shape", default="1.3b", help="125m, 1.3b, 6.7b, or demo")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--policy", help="default: weights on disk; for overhead in RAM")
    parser.add_argument("--block", type=int, metavar="N", help="sequences; found by balance where left out")
    parser.add_argument(
        "--context", type=int, default=128, help="tokens in the KV cache when decoding begins"
    )
    parser.add_argument("--passes", type=int, default=4, metavar="N", help="decode passes of a repetition")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="125m, two passes, two repeats")
    parser.add_argument("--no-drop-caches", action="store_true", help="drop only the files' own pages")
    parser.add_argument("--work", type=Path, default=Path("results/offload/overlap"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS / "overlap.jsonl")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape = "demo" if options.shape == "demo" else "125m"
        options.passes, options.repeats = 2, 2
    if options.policy is None:
        options.policy = "weights=host,kv=host" if options.what == "overhead" else "weights=disk,kv=host"
    print({"balance": balance, "flat": flat, "overhead": overhead}[options.what](Bench(options)))
    return 0


class Bench:
    """An engine with its weights in place, and the log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = RepetitionLog(options.out, KEYS)
        self.model = (
            DEMO if options.shape == "demo" else checkpoint(options.work, options.shape, options.layers)
        )
        offload = options.work / "offload"
        self.cold = [self.model, offload, own_store(options.work)]
        self.engine = Engine(self.model, Policy.parse(options.policy), offload_dir=offload)
        shape = options.shape if options.layers is None else f"{options.shape}, {options.layers} layers"
        self.name = {"what": options.what, "shape": shape, "policy": options.policy}

    def decode(self, block: int, schedule: Schedule) -> list[float]:
        """Seconds of decode passes at the context; without the first, whose weights nothing prefetched."""
        drop(self.cold, not self.options.no_drop_caches)
        with past_filled():
            return timed(self.engine, self.requests(block, schedule), self.cold)[1:-1]

    def requests(self, block: int, schedule: Schedule) -> list[Request]:
        """One request per slot; also sets the engine's block and schedule."""
        options = self.options
        set_block(self.engine, block, 1, options.context + 1, filled=True)
        self.engine.policy = self.engine.policy.replace(schedule=schedule)
        ids = prompts(block, options.context + 1, self.engine.spec.vocab_size)
        return [Request(prompt, options.passes + 2) for prompt in ids]


def balance(bench: Bench) -> str:
    """Find the block at which a sequential walk's I/O takes as long as compute, then compare both walks."""
    options, log = bench.options, bench.log
    block = options.block or balanced_block(bench)
    for repeat in range(options.repeats):
        row = {**bench.name, "block": block, "context": options.context, "requests": block, "repeat": repeat}
        if log.has(row):
            continue
        sequential = bench.decode(block, Schedule.SEQUENTIAL)
        moving, computing = streams(bench, len(sequential) + 2)
        overlapped = bench.decode(block, Schedule.OVERLAPPED)
        ratio = statistics.median(sequential) / statistics.median(overlapped)
        log.add({**row, "sequential": sequential, "overlapped": overlapped, "ratio": ratio,
                 "moving": moving, "computing": computing})  # fmt: skip
        say(f"block {block}: sequential {statistics.median(sequential):.3f} s, ratio {ratio:.2f}")
    lines = []
    for row in (rows := chosen(bench, "ratio"))[:1]:
        shares = [statistics.median([r[name] for r in rows]) * 1e3 for name in ("moving", "computing")]
        times = [
            spread([statistics.median(r[name]) * 1e3 for r in rows], 0)
            for name in ("sequential", "overlapped")
        ]
        ratio = spread([r["ratio"] for r in rows])
        lines.append(
            [row["shape"], row["policy"], row["block"], *(f"{s:.0f}" for s in shares), *times, ratio]
        )
    header = [
        "model",
        "policy",
        "block",
        "I/O ms",
        "compute ms",
        "sequential ms",
        "overlapped ms",
        "speed-up",
    ]
    return markdown(header, lines)


def balanced_block(bench: Bench) -> int:
    """The block whose compute time is closest to its I/O time."""
    found: dict[int, float] = {}
    for block in BLOCKS:
        try:
            passes = bench.decode(block, Schedule.SEQUENTIAL)
        except BudgetError as error:
            say(f"block {block}: {error}")
            break
        moving, computing = streams(bench, len(passes) + 2)
        found[block] = max(moving, computing) / max(min(moving, computing), 1e-9)
        say(f"block {block}: moving {moving * 1e3:.0f} ms, computing {computing * 1e3:.0f} ms a pass")
        if computing > 1.2 * moving:
            break
    return min(found, key=lambda block: found[block])


def streams(bench: Bench, passes: int) -> tuple[float, float]:
    """Seconds per pass of all I/O streams together and of the compute stream, from the trace."""
    busy = bench.engine.trace.busy
    return sum(busy[stream] for stream in _IO) / passes, busy["compute"] / passes


def flat(bench: Bench) -> str:
    """Time per token and memory with 1 to 16 times the requests, in the same slots."""
    options, log = bench.options, bench.log
    block = options.block or 8
    vocabulary = bench.engine.spec.vocab_size
    set_block(bench.engine, block, 1, options.context)
    bench.engine.answer([Request((5,) * 8, 2)])
    for repeat in range(options.repeats):
        for factor in FACTORS:
            count = factor * block
            row = {
                **bench.name,
                "block": block,
                "context": options.context,
                "requests": count,
                "repeat": repeat,
            }
            if log.has(row):
                continue
            drop(bench.cold, not options.no_drop_caches)
            requests = [Request(p, options.passes * 2) for p in prompts(count, options.context, vocabulary)]
            seconds = sum(timed(bench.engine, requests, bench.cold))
            per_token = seconds / sum(request.max_new_tokens for request in requests)
            peaks = {tier: held.peak for tier, held in bench.engine.record().memory.items()}
            memory = {"resident": resident(), "peaks": peaks}
            log.add({**row, "factor": factor, "per_token": per_token, **memory})
            say(f"{count} requests: {per_token * 1e3:.2f} ms a token, {format_bytes(resident())}")
    lines = []
    rows = chosen(bench, "per_token")
    first = statistics.median([row["per_token"] for row in rows if row["factor"] == 1] or [float("nan")])
    for factor in FACTORS:
        here = [row for row in rows if row["factor"] == factor]
        if here:
            memory = statistics.median(row["resident"] for row in here)
            planned = max(sum(row["peaks"].values()) for row in here)
            lines.append([f"{factor} x", spread([row["per_token"] * 1e3 for row in here]),
                          spread([row["per_token"] / first for row in here]),
                          format_bytes(memory), format_bytes(planned)])  # fmt: skip
    return markdown(["requests", "ms per token", "against 1 x", "process holds", "tiers' peak"], lines)


def resident() -> int:
    """Resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def overhead(bench: Bench) -> str:
    """Share of our own Python in a decode pass: self time under the profiler / time of a pass without it.

    The profiler slows down Python calls but no kernel, so the share is an upper bound. The walk is the
    sequential one, as the profiler sees only one thread.
    """
    options, log = bench.options, bench.log
    for block in (options.block,) if options.block else (1, 16):
        for repeat in range(options.repeats):
            row = {
                **bench.name,
                "block": block,
                "context": options.context,
                "requests": block,
                "repeat": repeat,
            }
            if log.has(row):
                continue
            plain = bench.decode(block, Schedule.SEQUENTIAL)
            requests = bench.requests(block, Schedule.SEQUENTIAL)
            with past_filled():
                kinds, passes = profile_passes(bench.engine, requests)
            wall = statistics.median(plain)
            shares = {kind: seconds / passes / wall for kind, seconds in kinds.items()}
            log.add({**row, "pass_seconds": wall, "shares": shares, "profiled_passes": passes})
            say(f"block {block}: {wall * 1e3:.1f} ms a pass, our Python {shares['engine'] * 100:.2f} %")
    lines = []
    rows = chosen(bench, "shares")
    for block in dict.fromkeys(row["block"] for row in rows):
        here = [row for row in rows if row["block"] == block]
        shares = [spread([100 * row["shares"][kind] for row in here], 1) for kind in KINDS]
        wall = spread([row["pass_seconds"] * 1e3 for row in here], 1)
        lines.append([here[0]["shape"], here[0]["policy"], block, wall, *shares])
    header = ["model", "policy", "block", "ms a pass", *(f"{kind}, %" for kind in KINDS)]
    return markdown(header, lines)


def chosen(bench: Bench, field: str) -> list[dict]:  # type: ignore[type-arg]
    """The log's repetitions of this measurement that have the field."""
    return [row for row in bench.log.rows
            if field in row and all(row[key] == value for key, value in bench.name.items())]  # fmt: skip


if __name__ == "__main__":
    run(main)
