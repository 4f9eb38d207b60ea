"""Speed against accuracy and latency against throughput: which policies are worth having.

It knows suites and instances; it does not know how points are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from harness.report.analysis.findings import Findings
from harness.report.content import MISSING, Mean, Table, per_second, seconds, with_interval
from harness.report.inputs.instances import asked


@dataclass(frozen=True)
class Standing:
    """One policy between speed and accuracy."""

    policy: str
    index: int
    rate: float | None
    """Prompt and generated tokens per second over all passes."""

    accuracy: Mean | None
    dominated_by: str | None
    """A policy that is at least as fast and as accurate, and better in one of the two."""

    latency: float | None
    slow_latency: float | None
    """Median and 95th percentile of the requests' seconds in the block; None where not recorded."""


def standings(suite: Findings) -> list[Standing]:
    """Every policy with what dominates it.

    Raises:
        UsageError: if a file of single requests is damaged.
    """
    points = [(p.name, p.total_per_second, suite.means.get(p.name)) for p in suite.policies]
    found = []
    for index, (name, rate, mean) in enumerate(points):
        latencies = sorted(_latencies(suite, name))
        middle = median(latencies) if latencies else None
        slow = latencies[max(0, -(-95 * len(latencies) // 100) - 1)] if latencies else None
        found.append(Standing(name, index, rate, mean, _dominating(points, name), middle, slow))
    return found


def _dominating(points: Sequence[tuple[str, float | None, Mean | None]], name: str) -> str | None:
    rate, mean = next((r, m) for n, r, m in points if n == name)
    if rate is None or mean is None:
        return None
    for other, other_rate, other_mean in points:
        if other == name or other_rate is None or other_mean is None:
            continue
        as_good = other_rate >= rate and other_mean.value >= mean.value
        if as_good and (other_rate > rate or other_mean.value > mean.value):
            return other
    return None


def _latencies(suite: Findings, policy: str) -> list[float]:
    found = []
    for entry in suite.run_entries:
        result = suite.result(entry, policy)
        requests = asked(result).values() if result else ()
        found += [request.seconds for request in requests if request.seconds is not None]
    return found


def frontier_table(suite: Findings, found: Sequence[Standing]) -> Table:
    """Speed, accuracy, latency and what dominates."""
    rows = tuple(
        (
            suite.names[s.policy],
            suite.names[s.dominated_by] if s.dominated_by else "nobody" if s.rate and s.accuracy else MISSING,
            per_second(s.rate), *with_interval(s.accuracy), seconds(s.latency), seconds(s.slow_latency),
        )
        for s in found
    )  # fmt: skip
    columns = (
        "policy", "dominated by", "total token/s", "mean accuracy", "95 % interval",
        "median latency", "95th percentile",
    )  # fmt: skip
    return Table(f"Speed, accuracy, latency ({suite.kinds})", columns, rows, names=2)
