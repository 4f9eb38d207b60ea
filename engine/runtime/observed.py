"""Adds what streams and tiers are doing to the progress that a call reports.

It knows the trace and the ledger of an engine, and nothing of the call.
"""

from __future__ import annotations

from dataclasses import replace

from engine.memory.storage import ByteLedger
from engine.spec.request import OnProgress, Progress
from engine.trace import Trace


def observed(on_progress: OnProgress | None, trace: Trace, ledger: ByteLedger) -> OnProgress | None:
    """The same callback, with each stream's busy seconds and each tier's bytes and limit added."""
    if on_progress is None:
        return None

    def report(state: Progress) -> None:
        held, limits = dict(ledger.held), dict(ledger.limits)
        on_progress(
            replace(
                state,
                busy_seconds=dict(trace.busy),
                held={tier.value: count for tier, count in held.items()},
                limits={tier.value: count for tier, count in limits.items()},
            )
        )

    return report
