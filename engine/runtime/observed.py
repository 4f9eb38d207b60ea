"""What streams and tiers are doing, put into the word that a call gives of its progress.

It knows the trace and the ledger of an engine, and nothing of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.memory.storage import ByteLedger
from engine.spec.request import Progress
from engine.trace import Trace

OnProgress = Callable[[Progress], None]


def observed(on_progress: OnProgress | None, trace: Trace, ledger: ByteLedger) -> OnProgress | None:
    """The same callback, told also how long each stream was busy and what each tier holds and may hold."""
    if on_progress is None:
        return None

    def tell(state: Progress) -> None:
        held, limits = dict(ledger.held), dict(ledger.limits)
        on_progress(
            replace(
                state,
                busy_seconds=dict(trace.busy),
                held={tier.value: count for tier, count in held.items()},
                limits={tier.value: count for tier, count in limits.items()},
            )
        )

    return tell
