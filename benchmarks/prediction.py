#!/usr/bin/env python
"""How far predicted pass times are from measured ones, over policies that nothing was fitted on.

    python benchmarks/prediction.py             # profile and all policies, three times
    python benchmarks/prediction.py --quick     # a few of the policies, once
    python benchmarks/prediction.py --profile results/profiles/NAME.json

Every repetition measures the machine as `run_helm.py profile` does and then all policies. A shared machine is
not as fast now as it was a minute ago, so that the profile's own yardstick, two products and reads of a file
that are always the same, is measured again within every pass and after it, and the profile is taken at that
pace; predictions by the unchanged profile are shown beside. A profile knows none of these models, policies or
blocks, and no figure of this script goes back into it. Prefill and decode passes are judged apart, by the
median error of the repetitions. Rows are appended to a file of JSON lines; started again, the script goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.records import RESULTS, Log, Row, markdown, say
from benchmarks.script import run
from benchmarks.synthetic import checkpoint, own_store, prompts
from engine.engine import Engine
from engine.profiler import check_machine, measure_profile
from engine.profiling.links import scratch_tiers
from engine.profiling.pace import Yardstick, mean_pace
from engine.profiling.passes import compare_passes
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request

KEYS = ("shape", "policy", "batch", "batches", "prompt", "tokens", "profile", "repeat")
HERE = RESULTS.parent / "prediction"


@dataclass(frozen=True)
class Cell:
    """One policy, with the load it is judged on."""

    shape: str
    policy: str
    batch: int
    batches: int
    prompt: int
    tokens: int = 6
    """Generated per sequence: one in prefill, the others in as many decode passes."""

    @property
    def name(self) -> dict[str, object]:
        """What identifies it in the log."""
        return dict(vars(self))


_RAM = "weights=host,kv=host"
_DISK = "weights=disk,kv=host"
_ALL_DISK = "weights=disk,kv=disk"
_HALF = "weights=0/0.5/0.5,kv=host"
_FOUR = f"{_RAM},weight_quant=4,kv_quant=4"
_FOUR_DISK = f"{_DISK},weight_quant=4,kv_quant=4"
_EIGHT = f"{_RAM},weight_quant=8"
_EIGHT_DISK = f"{_DISK},weight_quant=8"
_KV_DISK = "weights=host,kv=disk"
_KV_FOUR = f"{_RAM},kv_quant=4"
_KIVI = f"{_RAM},kv_quant=kivi"
_HIDDEN = "weights=host,kv=host,activations=disk"
_IN_ORDER = f"{_DISK},schedule=sequential"

CELLS = (
    Cell("125m", _RAM, 1, 1, 128, 24),
    Cell("125m", _RAM, 12, 1, 64),
    Cell("125m", _RAM, 4, 4, 256),
    Cell("125m", _DISK, 1, 1, 48, 24),
    Cell("125m", _DISK, 8, 2, 96),
    Cell("125m", _DISK, 32, 1, 32),
    Cell("125m", _ALL_DISK, 4, 1, 384),
    Cell("125m", _ALL_DISK, 16, 2, 128),
    Cell("125m", _HALF, 6, 1, 192),
    Cell("125m", _FOUR, 2, 1, 512, 12),
    Cell("125m", _FOUR, 24, 1, 96),
    Cell("125m", _FOUR_DISK, 1, 1, 64, 24),
    Cell("125m", _FOUR_DISK, 16, 1, 128),
    Cell("125m", _EIGHT, 3, 1, 96, 12),
    Cell("125m", _EIGHT, 20, 2, 48),
    Cell("125m", _EIGHT_DISK, 8, 1, 160),
    Cell("125m", _KV_DISK, 8, 1, 320),
    Cell("125m", _KV_FOUR, 10, 2, 200),
    Cell("125m", _KIVI, 8, 1, 128),
    Cell("125m", _HIDDEN, 8, 4, 64),
    Cell("125m", _IN_ORDER, 4, 2, 128),
    Cell("350m", _RAM, 1, 1, 64, 12),
    Cell("350m", _RAM, 16, 1, 128),
    Cell("350m", _DISK, 1, 1, 128, 12),
    Cell("350m", _DISK, 8, 4, 32),
    Cell("350m", _DISK, 24, 1, 96),
    Cell("350m", _ALL_DISK, 8, 1, 256),
    Cell("350m", _HALF, 2, 2, 128),
    Cell("350m", _FOUR, 1, 1, 96, 12),
    Cell("350m", _FOUR, 12, 2, 64),
    Cell("350m", _FOUR_DISK, 8, 1, 192),
    Cell("350m", _EIGHT, 6, 1, 128),
    Cell("350m", _EIGHT_DISK, 1, 1, 64, 12),
    Cell("350m", _KV_DISK, 4, 2, 256),
    Cell("350m", _KV_FOUR, 4, 1, 448),
    Cell("350m", _IN_ORDER, 8, 1, 64),
)
"""The judged policies: tiers, bits, block shapes and lengths, over two sizes of a model."""

BOUND = 0.25
"""Error that no pass time should exceed."""

QUICK = (1, 4, 10, 14, 21)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the log lacks, then print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of this machine; measured before every repetition if none",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--quick", action="store_true", help=f"only {len(QUICK)} of the policies, once")
    parser.add_argument("--only", metavar="WORD", help="only policies in whose text it is")
    parser.add_argument("--report", action="store_true", help="measure nothing: table and plot of the log")
    parser.add_argument("--work", type=Path, default=Path("results/offload/prediction"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=HERE / "prediction.jsonl")
    options = parser.parse_args(arguments)
    cells = [CELLS[index] for index in QUICK] if options.quick else list(CELLS)
    cells = [cell for cell in cells if not options.only or options.only in f"{cell.shape} {cell.policy}"]
    log = Log(options.out, KEYS)
    if not options.report:
        own_store(options.work)
        device = torch.device("cpu")
        with scratch_tiers(device, True, options.work / "offload") as tiers:
            yardstick = Yardstick(device, tiers)
            for repeat in range(1 if options.quick else options.repeats):
                profile = profile_of(repeat, options.profile, options.out.parent, options.work)
                for row in measured(cells, profile, repeat, log, options.work, yardstick):
                    log.add(row)
                    say(line_of(row))
    rows = [row for row in log.rows if any(row["name"] == cell.name for cell in cells)]
    text = report(rows)
    print(text)
    if rows:
        options.out.with_suffix(".md").write_text(text)
        plot(rows, options.out.with_suffix(".png"))
    return 0


def profile_of(repeat: int, given: Path | None, out: Path, work: Path) -> HardwareProfile:
    """The profile of a repetition: the one that is given, or one measured now and kept beside the rows."""
    path = given or out / f"profile-{repeat}.json"
    if given is None and not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        say(f"measuring the machine for repetition {repeat}")
        out.mkdir(parents=True, exist_ok=True)
        measure_profile("cpu", work).save(path)
    profile = HardwareProfile.load(path)
    check_machine(profile, "cpu")
    return profile


def measured(
    cells: Sequence[Cell], profile: HardwareProfile, repeat: int, log: Log, work: Path, yardstick: Yardstick
) -> Iterator[Row]:
    """One repetition of every cell that the log lacks; cells of one policy share an engine's weights."""
    for (shape, policy), group in groupby(cells, key=lambda cell: (cell.shape, cell.policy)):
        todo = [
            (cell, row)
            for cell in group
            if not log.has(row := {**cell.name, "profile": profile.name, "repeat": repeat})
        ]
        if not todo:
            continue
        model = checkpoint(work, shape)
        with Engine(model, Policy.parse(policy), offload_dir=work / "offload", device="cpu") as engine:
            engine.answer([Request((5,) * 8, 2)])
            for cell, row in todo:
                yield {**row, "name": cell.name, **judged(engine, cell, profile, yardstick)}


def judged(engine: Engine, cell: Cell, profile: HardwareProfile, yardstick: Yardstick) -> Row:
    """Seconds of a cell's mean prefill pass, and of its mean decode pass: measured and predicted.

    Predicted at the pace of the machine within each pass and right after it, and at that of the profile
    (``unpaced``).
    """
    engine.policy = engine.policy.replace(
        device_batch=cell.batch, num_device_batches=cell.batches, max_batch_tokens=2048
    )
    ids = prompts(cell.batch * cell.batches, cell.prompt, engine.spec.vocab_size)
    requests = [Request(prompt, cell.tokens) for prompt in ids]
    passes = compare_passes(engine, requests, profile, yardstick)
    found: Row = {}
    for kind, wanted in (("prefill", True), ("decode", False)):
        chosen = [one for one in passes if one.work.has_prompts is wanted]
        found[kind] = {
            "measured": statistics.fmean(one.seconds for one in chosen),
            "predicted": statistics.fmean(one.paced for one in chosen),
            "unpaced": statistics.fmean(one.predicted for one in chosen),
            "pace": asdict(mean_pace([one.pace for one in chosen])),
            "passes": len(chosen),
        }
    return found


def error_of(measured: float, predicted: float) -> float:
    """By what fraction of the measurement a prediction is too long; negative if too short."""
    return predicted / measured - 1


def line_of(row: Row) -> str:
    """A row in words."""
    parts = [f"{row['shape']} {row['policy']} {row['batch']}x{row['batches']} prompt {row['prompt']}:"]
    for kind in ("prefill", "decode"):
        times = row[kind]
        parts.append(
            f"{kind} {times['measured'] * 1e3:.0f} ms, predicted {times['predicted'] * 1e3:.0f} "
            f"({error_of(times['measured'], times['predicted']):+.0%})"
        )
    return " ".join(parts)


@dataclass(frozen=True)
class Judged:
    """One policy, repetitions taken together."""

    row: Row
    kind: str
    measured: float
    error: float
    """Median of the repetitions' `error_of`."""

    unpaced: float
    """The same of the profile as it is."""

    spread: float | None = None
    """Mean distance of repeated measurements from their median, as a fraction; None of a single one."""

    @property
    def predicted(self) -> float:
        """Seconds at the pace of what was measured."""
        return self.measured * (1 + self.error)


def judgements(rows: Sequence[Row]) -> list[Judged]:
    """Medians over the repetitions of each policy, prefill and decode apart."""
    found = []
    for cell in CELLS:
        own = [row for row in rows if row["name"] == cell.name]
        for kind in ("prefill", "decode") if own else ():
            times = [row[kind] for row in own]
            measured = statistics.median(time["measured"] for time in times)
            apart = [abs(time["measured"] / measured - 1) for time in times]
            error, unpaced = (
                statistics.median(error_of(time["measured"], time[what]) for time in times)
                for what in ("predicted", "unpaced")
            )
            spread = statistics.fmean(apart) if len(own) > 1 else None
            found.append(Judged(own[0], kind, measured, error, unpaced, spread))
    return found


def report(rows: Sequence[Row]) -> str:
    """All judged policies, and the two figures that count."""
    found = judgements(rows)
    if not found:
        return "nothing was measured yet"
    lines = [
        [j.row["shape"], j.row["policy"], f"{j.row['batch']}x{j.row['batches']}", j.row["prompt"], j.kind,
         f"{j.measured * 1e3:.1f}", f"{j.predicted * 1e3:.1f}", f"{j.error:+.1%}"]
        for j in found
    ]  # fmt: skip
    table = markdown(
        ["model", "policy", "block", "prompt", "pass", "measured ms", "predicted ms", "error"], lines
    )
    policies = len({str(j.row["name"]) for j in found})
    text = (
        f"{table}\n{policies} policies, {len(found)} pass times: {in_words([j.error for j in found])}; "
        f"profile {rows[-1]['profile']}\n"
        f"By the profile as it is, at its own pace: {in_words([j.unpaced for j in found])}\n"
    )
    apart = sorted(spread for j in found if (spread := j.spread) is not None)
    if apart:
        text += (
            f"The same passes measured again: {statistics.fmean(apart):.1%} from their median on average, "
            f"{apart[-1]:.1%} at worst.\n"
        )
    return text


def in_words(errors: Sequence[float]) -> str:
    """What is asked of errors."""
    ordered = sorted(map(abs, errors))
    return (
        f"mean absolute error {statistics.fmean(ordered):.1%}, median {statistics.median(ordered):.1%}, "
        f"worst {ordered[-1]:.1%}, {sum(error > BOUND for error in ordered)} beyond {BOUND:.0%}"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted over measured pass times, with the bounds that are asked of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 6.0))
    found = judgements(rows)
    for kind, marker in (("prefill", "s"), ("decode", "o")):
        chosen = [j for j in found if j.kind == kind]
        axes.scatter(
            [j.measured for j in chosen], [j.predicted for j in chosen], marker=marker, label=kind, s=28
        )
    ends = [min(j.measured for j in found) / 1.5, max(j.measured for j in found) * 1.5]
    axes.plot(ends, ends, color="0.4", linewidth=1, label="equal")
    for factor in (1 - BOUND, 1 + BOUND):
        axes.plot(
            ends, [factor * end for end in ends], color="0.7", linewidth=1, linestyle="--",
            label="25 % off" if factor > 1 else None,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured seconds of a pass")
    axes.set_ylabel("predicted seconds of a pass")
    axes.set_title("Predicted pass times at the pace beside each, policies held out")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main)
