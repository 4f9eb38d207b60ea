"""The seven HELM sub-scenarios of the FlexGen paper, simulated on its machine with this engine's planner.

    python -m benchmarks.helm_simulated

Nothing is measured here: synthetic requests have the published lengths, the planner finds a policy for each
run entry on the published profile of the paper's machine, and the run is simulated pass by pass. The table
adds FlexGen's own minutes and their simulation (`run_helm.py paper`). Nothing is compressed, as in theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import RESULTS
from engine.errors import TierbenchError
from engine.plan.workload import Workload
from engine.planner import Compression, Constraints, find_profile, make_plan, spec_for
from engine.spec.policy import Policy
from engine.spec.request import Request

TRIALS = 3
"""Train trials of the published runs: each has in-context examples of its own."""


@dataclass(frozen=True)
class Scenario:
    """A sub-scenario with the means that FlexGen's authors noted, in tokens of OPT's tokenizer."""

    name: str
    instances: int
    prompt: int
    """Mean length of a prompt."""

    shared: float
    """Fraction of it that all prompts of a train trial share."""

    limit: int
    """Max tokens to generate."""

    answer: float
    """Mean length of an answer."""

    minutes: float
    """Published time of OPT-IML-30B on one T4."""

    simulated: float
    """Minutes of FlexGen's own runtime, simulated by `run_helm.py paper`."""


SCENARIOS = (
    Scenario("wikifact plaintiff", 96, 83, 0.80, 8, 8, 10, 5.42),
    Scenario("wikifact instance_of", 850, 83, 0.80, 8, 8, 55, 48.74),
    Scenario("mmlu abstract_algebra", 100, 468, 0.80, 1, 1, 31, 24.03),
    Scenario("mmlu us_foreign_policy", 100, 468, 0.80, 1, 1, 33, 28.04),
    Scenario("synthetic_reasoning pattern_match", 515, 286, 0.87, 50, 14, 118, 102.43),
    Scenario("synthetic_reasoning_natural easy", 515, 400, 0.60, 20, 9, 100, 85.66),
    Scenario("summarization_xsum", 518, 1510, 0.67, 64, 24, 902, 738.20),
)
"""Shared parts: of HELM's own prompts for the synthetic ones and MMLU (380 of 470 tokens), at least 1,000 of
1,500 for XSUM, five of six facts of about one length for wikifact."""


def requests_of(scenario: Scenario, seed: int = 0) -> tuple[list[Request], list[int]]:
    """Synthetic requests of these lengths, and how long their answers are."""
    draw = random.Random(seed)
    common = round(scenario.prompt * scenario.shared)
    requests, lengths = [], []
    for _ in range(TRIALS):
        examples = tuple(draw.randrange(4, 50_000) for _ in range(common))
        for _ in range(scenario.instances):
            own = max(1, round((scenario.prompt - common) * draw.uniform(0.5, 1.5)))
            prompt = (*examples, *(draw.randrange(4, 50_000) for _ in range(own)))
            requests.append(Request(prompt, scenario.limit))
            lengths.append(max(1, min(scenario.limit, round(draw.expovariate(1 / scenario.answer) + 0.5))))
    return requests, lengths


def main() -> int:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="t4")
    parser.add_argument("--model", default="opt-30b")
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "evaluation_loads")
    args = parser.parse_args()
    profile = find_profile(args.profile)
    spec = spec_for(args.model, profile)
    lines = [
        f"All simulated, {args.model} on profile {args.profile}; minutes.", "",
        "| sub-scenario | requests | published | FlexGen simulated | ours | computed / needed | policy |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    rows = []
    for scenario in SCENARIOS:
        requests, lengths = requests_of(scenario)
        workload = Workload.of(requests, Policy(), lengths)
        found = make_plan(
            profile, spec, workload, constraints=Constraints(Compression.EXACT), explain=False
        ).best
        minutes = (found.estimate.prefill_seconds + found.estimate.decode_seconds) / 60
        computed = sum(shape.need.computed for shape in workload.requests) + sum(lengths) - len(lengths)
        ratio = computed / (workload.arrangement.distinct + sum(lengths))
        policy = ",".join(
            f"{key}={value}" for key, value in found.policy.to_dict().items()
            if value != Policy().to_dict()[key] and key != "name"
        )  # fmt: skip
        rows.append(
            {"name": scenario.name, "requests": len(requests), "published": scenario.minutes,
             "flexgen_simulated": scenario.simulated, "minutes": minutes, "policy": policy,
             "kind": "simulated"}
        )  # fmt: skip
        lines.append(
            f"| {scenario.name} | {len(requests)} | {scenario.minutes:.0f} | {scenario.simulated:.1f} | "
            f"{minutes:.1f} | {ratio:.3f} | `{policy}` |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    totals = [sum(float(row[key]) for row in rows) for key in ("published", "flexgen_simulated", "minutes")]
    lines.append(f"| **total** | | {totals[0]:,.0f} | {totals[1]:,.0f} | {totals[2]:,.0f} | | |")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "helm_simulated.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output / "helm_simulated.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TierbenchError as error:
        sys.exit(f"error: {error}")
