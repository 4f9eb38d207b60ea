#!/usr/bin/env python
"""How far predicted pass times are from measured ones, over policies that nothing was fitted on.

    python benchmarks/prediction.py             # profile and all policies, three times
    python benchmarks/prediction.py --quick     # a few of the policies, once
    python benchmarks/prediction.py --profile results/profiles/NAME.json

Every repetition measures the machine as `run_helm.py profile` does and then all policies. The speed of a
shared machine changes within minutes. Therefore the profile's own yardstick, which consists of two fixed
products and reads of a file, is measured again during and after every pass, and the profile is scaled to that
pace; predictions from the unscaled profile are reported, too. A profile contains none of these models,
policies or blocks, and no figure of this script goes back into it. Prefill and decode passes are judged
separately, by the median error of the repetitions. Rows are appended to a file of JSON lines; started again,
the script continues.
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

from benchmarks.records import RESULTS, Repetition, RepetitionLog, markdown, say
from benchmarks.script import run
from benchmarks.synthetic import checkpoint, own_store, prompts
from engine.engine import Engine
from engine.profiler import check_machine, measure_profile
from engine.profiling.links import scratch_tiers
from engine.profiling.pace import Yardstick
from engine.profiling.passes import compare_passes
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request

KEYS = ("shape", "policy", "batch", "batches", "prompt", "tokens", "profile", "repeat")
HERE = RESULTS.parent / "prediction"


@dataclass(frozen=True)
class PolicyCase:
    """One policy, and the load for which its pass times are predicted."""

    shape: str
    policy: str
    batch: int
    batches: int
    prompt: int
    tokens: int = 6
    """Generated per sequence: one in prefill, each of the others in a decode pass."""

    @property
    def name(self) -> dict[str, object]:
        """Its fields, which identify it in the log."""
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

CASES = (
    PolicyCase("125m", _RAM, 1, 1, 128, 24),
    PolicyCase("125m", _RAM, 12, 1, 64),
    PolicyCase("125m", _RAM, 4, 4, 256),
    PolicyCase("125m", _DISK, 1, 1, 48, 24),
    PolicyCase("125m", _DISK, 8, 2, 96),
    PolicyCase("125m", _DISK, 32, 1, 32),
    PolicyCase("125m", _ALL_DISK, 4, 1, 384),
    PolicyCase("125m", _ALL_DISK, 16, 2, 128),
    PolicyCase("125m", _HALF, 6, 1, 192),
    PolicyCase("125m", _FOUR, 2, 1, 512, 12),
    PolicyCase("125m", _FOUR, 24, 1, 96),
    PolicyCase("125m", _FOUR_DISK, 1, 1, 64, 24),
    PolicyCase("125m", _FOUR_DISK, 16, 1, 128),
    PolicyCase("125m", _EIGHT, 3, 1, 96, 12),
    PolicyCase("125m", _EIGHT, 20, 2, 48),
    PolicyCase("125m", _EIGHT_DISK, 8, 1, 160),
    PolicyCase("125m", _KV_DISK, 8, 1, 320),
    PolicyCase("125m", _KV_FOUR, 10, 2, 200),
    PolicyCase("125m", _KIVI, 8, 1, 128),
    PolicyCase("125m", _HIDDEN, 8, 4, 64),
    PolicyCase("125m", _IN_ORDER, 4, 2, 128),
    PolicyCase("350m", _RAM, 1, 1, 64, 12),
    PolicyCase("350m", _RAM, 16, 1, 128),
    PolicyCase("350m", _DISK, 1, 1, 128, 12),
    PolicyCase("350m", _DISK, 8, 4, 32),
    PolicyCase("350m", _DISK, 24, 1, 96),
    PolicyCase("350m", _ALL_DISK, 8, 1, 256),
    PolicyCase("350m", _HALF, 2, 2, 128),
    PolicyCase("350m", _FOUR, 1, 1, 96, 12),
    PolicyCase("350m", _FOUR, 12, 2, 64),
    PolicyCase("350m", _FOUR_DISK, 8, 1, 192),
    PolicyCase("350m", _EIGHT, 6, 1, 128),
    PolicyCase("350m", _EIGHT_DISK, 1, 1, 64, 12),
    PolicyCase("350m", _KV_DISK, 4, 2, 256),
    PolicyCase("350m", _KV_FOUR, 4, 1, 448),
    PolicyCase("350m", _IN_ORDER, 8, 1, 64),
)
"""Policies over tiers, bits, block shapes and lengths, for two sizes of a model."""

BOUND = 0.25
"""The error that no predicted pass time should exceed."""

QUICK = (1, 4, 10, 14, 21)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing in the log, then print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of this machine; default: measured before every repetition",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--quick", action="store_true", help=f"only {len(QUICK)} of the policies, once")
    parser.add_argument("--only", metavar="WORD", help="only policies whose text contains it")
    parser.add_argument("--report", action="store_true", help="measure nothing: table and plot of the log")
    parser.add_argument("--work", type=Path, default=Path("results/offload/prediction"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=HERE / "prediction.jsonl")
    options = parser.parse_args(arguments)
    cases = [CASES[index] for index in QUICK] if options.quick else list(CASES)
    cases = [case for case in cases if not options.only or options.only in f"{case.shape} {case.policy}"]
    log = RepetitionLog(options.out, KEYS)
    if not options.report:
        own_store(options.work)
        device = torch.device("cpu")
        with scratch_tiers(device, True, options.work / "offload") as tiers:
            yardstick = Yardstick(device, tiers)
            for repeat in range(1 if options.quick else options.repeats):
                profile = profile_of(repeat, options.profile, options.out.parent, options.work)
                for row in measured(cases, profile, repeat, log, options.work, yardstick):
                    log.add(row)
                    say(line_of(row))
    rows = [row for row in log.rows if any(row["name"] == case.name for case in cases)]
    text = report(rows)
    print(text)
    if rows:
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(rows, options.out.with_suffix(".png"))
    return 0


def profile_of(repeat: int, given: Path | None, out: Path, work: Path) -> HardwareProfile:
    """The profile of a repetition: the given one, or one that is measured now and kept beside the results."""
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
    cases: Sequence[PolicyCase],
    profile: HardwareProfile,
    repeat: int,
    log: RepetitionLog,
    work: Path,
    yardstick: Yardstick,
) -> Iterator[Repetition]:
    """One repetition of every case that is missing in the log; cases of one policy share an engine."""
    for (shape, policy), group in groupby(cases, key=lambda case: (case.shape, case.policy)):
        todo = [
            (case, row)
            for case in group
            if not log.has(row := {**case.name, "profile": profile.name, "repeat": repeat})
        ]
        if not todo:
            continue
        model = checkpoint(work, shape)
        with Engine(model, Policy.parse(policy), offload_dir=work / "offload", device="cpu") as engine:
            engine.answer([Request((5,) * 8, 2)])
            for case, row in todo:
                yield {**row, "name": case.name, **judged(engine, case, profile, yardstick)}


def mean_pace(paces: Sequence[dict[str, float]]) -> dict[str, float]:
    """The harmonic mean: by the seconds that the same work took."""
    return {name: statistics.harmonic_mean(pace[name] for pace in paces) for name in paces[0]}


def judged(engine: Engine, case: PolicyCase, profile: HardwareProfile, yardstick: Yardstick) -> Repetition:
    """Measured and predicted seconds of a case's mean prefill pass and mean decode pass.

    ``predicted`` is scaled to the machine's pace during and right after each pass, ``unpaced`` is not.
    """
    engine.policy = engine.policy.replace(
        device_batch=case.batch, num_device_batches=case.batches, max_batch_tokens=2048
    )
    ids = prompts(case.batch * case.batches, case.prompt, engine.spec.vocab_size)
    requests = [Request(prompt, case.tokens) for prompt in ids]
    passes = compare_passes(engine, requests, profile, yardstick)
    found: Repetition = {}
    for kind, wanted in (("prefill", True), ("decode", False)):
        chosen = [one for one in passes if one.work.has_prompts is wanted]
        found[kind] = {
            "measured": statistics.fmean(one.seconds for one in chosen),
            "predicted": statistics.fmean(one.paced for one in chosen),
            "unpaced": statistics.fmean(one.predicted for one in chosen),
            "pace": mean_pace([asdict(one.pace) for one in chosen]),
            "passes": len(chosen),
        }
    return found


def error_of(measured: float, predicted: float) -> float:
    """Relative error of a prediction: positive if it is too long."""
    return predicted / measured - 1


def line_of(row: Repetition) -> str:
    """A row as text."""
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
    """One kind of pass of one case, over all repetitions."""

    row: Repetition
    kind: str
    measured: float
    error: float
    """Median of the repetitions' `error_of`."""

    unpaced: float
    """The same for the unscaled profile."""

    spread: float | None = None
    """Mean relative distance of measurements from their median; None for a single one."""

    @property
    def predicted(self) -> float:
        """Predicted seconds, relative to the measured median."""
        return self.measured * (1 + self.error)


def judgements(rows: Sequence[Repetition]) -> list[Judged]:
    """Medians over the repetitions of each case, separately for prefill and decode."""
    found = []
    for case in CASES:
        own = [row for row in rows if row["name"] == case.name]
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


def report(rows: Sequence[Repetition]) -> str:
    """The table of all cases, and the error statistics."""
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
        f"With the unscaled profile: {in_words([j.unpaced for j in found])}\n"
    )
    apart = sorted(spread for j in found if (spread := j.spread) is not None)
    if apart:
        text += (
            f"The same passes measured again: {statistics.fmean(apart):.1%} from their median on average, "
            f"{apart[-1]:.1%} at worst.\n"
        )
    return text


def in_words(errors: Sequence[float]) -> str:
    """Statistics of errors as text."""
    ordered = sorted(map(abs, errors))
    return (
        f"mean absolute error {statistics.fmean(ordered):.1%}, median {statistics.median(ordered):.1%}, "
        f"worst {ordered[-1]:.1%}, {sum(error > BOUND for error in ordered)} beyond {BOUND:.0%}"
    )


def plot(rows: Sequence[Repetition], path: Path) -> None:
    """Plot predicted over measured pass times, with the bounds of the error."""
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
    axes.set_title("Predicted pass times at the measured pace, policies held out")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main)
