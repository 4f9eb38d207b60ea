#!/usr/bin/env python
"""Compares the planner's policy with the best of an exhaustively measured grid that contains it.

    python run_helm.py profile                                # measures this machine, once
    python benchmarks/search_quality.py --profile results/profiles/NAME.json
    python benchmarks/search_quality.py --profile ... --quick

A setting is a model and a memory budget; the load is the same for all. A budget decides which policies fit,
not how fast they are, so each policy is measured once for both budgets of a model. The speed of a shared
machine changes from one policy to the next: it is measured during and after every pass, and seconds are
scaled to the profile's pace by means of the cost model. Every repetition takes the policies in another order.
Repetitions are appended to a file of JSON lines; started again, the script continues.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.records import RESULTS, Repetition, RepetitionLog, markdown, say
from benchmarks.script import run
from benchmarks.synthetic import checkpoint, own_store, prompts
from engine.engine import Engine
from engine.errors import BudgetError
from engine.planner import plan_for
from engine.profiler import check_machine
from engine.profiling.links import scratch_tiers
from engine.profiling.pace import Yardstick
from engine.profiling.passes import compare_passes
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request
from engine.units import MIB, format_bytes
from harness.comparison.ratios import spread

HERE = RESULTS.parent / "prediction"
KEYS = ("shape", "policy", "load", "repeat")
BOUND = 0.95

WEIGHTS = ("device", "0.5/0/0.5", "disk")
KV = ("device", "disk")
BLOCKS = ((6, 1), (24, 1), (8, 3))
"""The grid, with the planner's policies."""


@dataclass(frozen=True)
class MemorySetting:
    """A model and its memory budget."""

    shape: str
    memory: int
    """Budget in bytes of device and host, which are one memory here."""

    def __str__(self) -> str:
        return f"{self.shape} in {format_bytes(self.memory)}"


SETTINGS = (
    MemorySetting("125m", 420 * MIB),
    MemorySetting("125m", 1024 * MIB),
    MemorySetting("350m", 640 * MIB),
    MemorySetting("350m", 2048 * MIB),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, measure what is missing in the log, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="of this machine")
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="generated of each")
    parser.add_argument("--requests", type=int, default=24, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--quick", action="store_true", help="the smaller model, a third of the load, once")
    parser.add_argument("--work", type=Path, default=Path("results/offload/prediction"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=HERE / "search_quality.jsonl")
    options = parser.parse_args(arguments)
    settings = SETTINGS
    if options.quick:
        settings, options.repeats, options.requests = SETTINGS[:2], 1, options.requests // 3
    profile = HardwareProfile.load(options.profile)
    check_machine(profile, "cpu")
    own_store(options.work)
    device = torch.device("cpu")
    with scratch_tiers(device, True, options.work / "offload") as tiers:
        bench = Bench(options, profile, RepetitionLog(options.out, KEYS), Yardstick(device, tiers))
        text = measured(bench, settings)
    print(text)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


def measured(bench: Bench, settings: Sequence[MemorySetting]) -> str:
    """Measure what is missing in the log; returns the table."""
    planned = {setting: bench.plan(setting) for setting in settings}
    for setting, policy in planned.items():
        say(f"{setting}: planned {policy.text}")
    grids = {setting: bench.grid(setting, policy) for setting, policy in planned.items()}
    for repeat in range(bench.options.repeats):
        for shape in dict.fromkeys(setting.shape for setting in settings):
            wanted = list({p: None for s in settings if s.shape == shape for p in grids[s]})
            random.Random(repeat).shuffle(wanted)
            for policy in wanted:
                bench.measure(shape, policy, repeat)
    return report(bench, planned, grids)


@dataclass(frozen=True)
class Bench:
    """The load, the profile, the log, and the yardstick of the machine's pace."""

    options: argparse.Namespace
    profile: HardwareProfile
    log: RepetitionLog
    yardstick: Yardstick

    @property
    def load(self) -> str:
        """The load's name: requests x prompt / generated tokens."""
        options = self.options
        return f"{options.requests}x{options.prompt}/{options.tokens}"

    def engine(self, shape: str, policy: Policy, memory: int | None = None) -> Engine:
        """An engine of a synthetic checkpoint."""
        work = self.options.work
        return Engine(
            checkpoint(work, shape), policy, budgets=Budgets(host=memory), offload_dir=work / "offload",
            device="cpu",
        )  # fmt: skip

    def requests(self, engine: Engine) -> list[Request]:
        """The load's requests."""
        options = self.options
        ids = prompts(options.requests, options.prompt, engine.spec.vocab_size)
        return [Request(prompt, options.tokens) for prompt in ids]

    def plan(self, setting: MemorySetting) -> Policy:
        """The planner's policy, in the precision of the checkpoint."""
        budgets = Budgets(host=setting.memory)
        with self.engine(setting.shape, Policy(), setting.memory) as engine:
            return plan_for(engine, self.requests(engine), self.profile, budgets, Policy()).best.policy

    def grid(self, setting: MemorySetting, planned: Policy) -> list[Policy]:
        """All policies of the grid that fit, the planner's among them."""
        candidates = [
            Policy.parse(
                f"weights={weights},kv={kv},device_batch={batch},num_device_batches={batches},"
                f"max_batch_tokens={batch * self.options.prompt}"
            )
            for weights, kv, (batch, batches) in itertools.product(WEIGHTS, KV, BLOCKS)
        ]
        found = {planned.text: planned}
        for policy in candidates:
            with self.engine(setting.shape, policy, setting.memory) as engine:
                try:
                    engine.check(self.requests(engine))
                except BudgetError:
                    continue
            found.setdefault(policy.text, policy)
        return list(found.values())

    def measure(self, shape: str, policy: Policy, repeat: int) -> None:
        """Measure the seconds of the whole load, unless the log has them."""
        row: Repetition = {"shape": shape, "policy": policy.text, "load": self.load, "repeat": repeat}
        if self.log.has(row):
            return
        with self.engine(shape, policy) as engine:
            engine.answer([Request((5,) * 8, 2)])  # loads
            requests = self.requests(engine)
            passes = compare_passes(engine, requests, self.profile, self.yardstick)
        measured, predicted, steady = (
            sum(getattr(one, name) for one in passes) for name in ("seconds", "predicted", "steady")
        )
        self.log.add(
            {
                **row,
                "seconds": steady,
                "measured": measured,
                "predicted": predicted,
                "profile": self.profile.name,
            }
        )
        times = f"{measured:.2f} s, at the profile's pace {steady:.2f}, predicted {predicted:.2f}"
        say(f"{shape} {row['policy']}: {times}")

    def throughputs(self, shape: str, policy: Policy) -> list[float]:
        """Generated tokens per second of every repetition."""
        tokens = self.options.requests * self.options.tokens
        return [
            tokens / row["seconds"]
            for row in self.log.rows
            if (row["shape"], row["policy"], row["load"]) == (shape, policy.text, self.load)
        ]


def report(
    bench: Bench, planned: dict[MemorySetting, Policy], grids: dict[MemorySetting, list[Policy]]
) -> str:
    """The table: per setting the planner's policy and the best measured one."""
    lines, worst = [], float("inf")
    for setting, policy in planned.items():
        rates = {other.text: bench.throughputs(setting.shape, other) for other in grids[setting]}
        best = max(rates, key=lambda name: statistics.median(rates[name]))
        mine = rates[policy.text]
        share = statistics.median(mine) / statistics.median(rates[best])
        worst = min(worst, share)
        lines.append(
            [
                setting,
                len(rates),
                policy.text,
                spread(mine),
                best,
                spread(rates[best]),
                f"{share:.3f}",
            ]
        )
    header = ["setting", "measured", "planned", "token/s", "best measured", "token/s", "share"]
    judged = f"lowest share {worst:.3f}, the target is {BOUND}; load {bench.load}"
    return f"{markdown(header, lines)}\n{judged}; profile {bench.profile.name}\n"


if __name__ == "__main__":
    run(main)
