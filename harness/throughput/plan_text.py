"""A plan as it is printed: the best policy, the next ten, what binds, why the alternatives lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from engine.spec.hardware import Tier
from engine.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from engine.planner import Plan, PlannedPolicy


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
        "  most bytes held: "
        + ", ".join(
            f"{tier.value} {format_bytes(best.memory.total(tier))} of {format_bytes(limits[tier])}"
            for tier in Tier
        ),
        "",
        "the next best:",
        *_table(("token/s", "block s", "binding", "policy"), map(_row, plan.result.others)),
        "",
        "why the obvious alternatives lose:",
        *_table(("alternative", "result"), ((other.name, other.why) for other in plan.alternatives)),
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
    estimate = found.estimate
    return (
        f"{estimate.throughput:.2f}",
        f"{estimate.block_seconds:.1f}",
        estimate.binding.value,
        found.policy.name,
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]
