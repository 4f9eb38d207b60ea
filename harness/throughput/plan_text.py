"""A plan as it is printed: the best policy, the next ten, what binds, why the alternatives lose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.spec.hardware import Tier
from engine.units import format_bytes, format_rate, format_seconds
from harness.text_table import markdown_table

if TYPE_CHECKING:
    from engine.planner import Plan, PlannedPolicy


_COLUMNS = ("token/s", "block s", "binding", "policy")


def to_text(plan: Plan) -> str:
    """All of it; tables are Markdown with aligned columns."""
    best, estimate = plan.best, plan.best.estimate
    limits = plan.result.limits
    requests = len(plan.workload.requests)
    lines = [
        f"{plan.spec.path} on {plan.profile.name} ({plan.profile.kind.value}), {requests:,} requests; "
        "every figure is simulated",
        "",
        f"best policy: {best.policy.name}",
        f"  generation throughput {format_rate(estimate.throughput, 'token')}: "
        f"prefill {format_seconds(estimate.prefill_seconds)}, decoding "
        f"{format_seconds(estimate.decode_seconds)}, {estimate.passes:,} passes; a block takes "
        f"{format_seconds(estimate.block_seconds)}",
        f"  binding: {_binding(best)}",
        "  peak memory: "
        + ", ".join(
            f"{tier.value} {format_bytes(best.memory.total(tier))} of {format_bytes(limits[tier])}"
            for tier in Tier
        ),
        "",
        "the next best:",
        *markdown_table([_COLUMNS, *map(_row, plan.result.others)], left=4),
        "",
        "why the obvious alternatives lose:",
        *markdown_table([("alternative", "result"), *((a.name, a.why) for a in plan.alternatives)], left=2),
        "",
        f"{plan.result.programs} linear programs among {plan.result.enumerated:,} blocks and formats",
    ]
    return "\n".join(lines)


def _binding(found: PlannedPolicy) -> str:
    estimate = found.estimate
    share = estimate.busy[estimate.binding] / estimate.seconds if estimate.seconds else 0.0
    memory = f"; full: {', '.join(found.tight)}" if found.tight else ""
    return f"{estimate.binding.value}, busy for {share:.2f} of the time{memory}"


def _row(found: PlannedPolicy) -> tuple[str, ...]:
    figures = f"{found.estimate.throughput:.2f}", f"{found.estimate.block_seconds:.1f}"
    return (*figures, found.estimate.binding.value, found.policy.name)
