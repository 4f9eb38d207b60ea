"""The physical bound of every stream, beside how long it was busy.

The bound is the time in which this machine's measured rates could have done the stream's work: what the
passes of the run had to move and compute, simulated on its profile. Without a profile (`run_helm.py profile`)
there are no bounds, and none is measured for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.errors import ProfileError
from engine.spec.record import EngineRecord
from engine.spec.request import Output, Request
from harness.engines.auto import PROFILES
from harness.engines.protocol import EngineLike

_WALKED = 16
"""Passes of a kind that are simulated; those between are interpolated."""


def with_bounds(
    record: EngineRecord,
    engine: EngineLike,
    requests: Sequence[Request],
    outputs: Sequence[Output],
    device: str,
    profiles: Path = PROFILES,
) -> EngineRecord:
    """The engine's record with ``bound_seconds`` of every stream that the profile knows the work of.

    Args:
        requests: those of the one call that the record describes.
        outputs: their answers, whose lengths decide how many passes there were.
        device: as in the engine's settings.
        profiles: folder of measured profiles.
    """
    from engine.engine import Engine
    from engine.planner import own_profile
    from engine.prediction import predict

    try:
        profile = own_profile(profiles, device)
    except ProfileError:  # commands that need a profile report a damaged file
        profile = None
    if not isinstance(engine, Engine):  # no plan is known of another system
        return record
    if profile is None or record.totals.requests != len(requests):
        return record
    lengths = [max(1, len(output.tokens)) for output in outputs]
    found = predict(engine, requests, profile, _WALKED, lengths)
    streams = {
        name: replace(stream, bound_seconds=found.estimate.streams.get(name))
        for name, stream in record.streams.items()
    }
    return replace(record, streams=streams, bounds_from=profile.name)
