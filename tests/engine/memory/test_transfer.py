"""Lanes: jobs in order, tickets that carry failures, threads that end."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from engine.memory.transfer import Lane, LaneStopped, Ticket
from engine.trace import Trace
from tests.support.engine_runs import lane_threads


@pytest.fixture
def lanes() -> tuple[Lane, Lane]:
    trace = Trace()
    return Lane("weights", trace, torch.device("cpu")), Lane("kv_in", trace, torch.device("cpu"))


def close(*lanes: Lane) -> None:
    for lane in lanes:
        lane.close()
    assert lane_threads() == []


def test_jobs_run_in_order_and_wait_for_other_lanes(lanes: tuple[Lane, Lane]) -> None:
    one, other = lanes
    order: list[str] = []

    def job(name: str, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        order.append(name)
        return 3

    first = one.submit("a", lambda: job("a", 0.05))
    second = other.submit("b", lambda: job("b"), after=[first])
    third = one.submit("c", lambda: job("c"), after=[second])
    third.wait()
    assert order == ["a", "b", "c"]
    close(one, other)


def test_failure_reaches_whoever_waits_and_what_comes_after(lanes: tuple[Lane, Lane]) -> None:
    one, other = lanes
    cause = ValueError("the disk is on fire")

    def failing() -> int:
        raise cause

    ran: list[int] = []
    failed = one.submit("a", failing)
    dependent = other.submit("b", lambda: ran.append(1) or 0, after=[failed])
    for ticket in (failed, dependent):
        with pytest.raises(ValueError) as caught:
            ticket.wait()
        assert caught.value is cause
    assert ran == []
    unconcerned = one.submit("c", lambda: 0)
    unconcerned.wait()
    close(one, other)


def test_stopped_lane_skips_what_has_not_begun(lanes: tuple[Lane, Lane]) -> None:
    one, other = lanes
    gate, begun = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        gate.wait()
        return 0

    running, queued = one.submit("a", slow), one.submit("b", lambda: 0)
    begun.wait()
    one.stop()
    gate.set()
    running.wait()
    with pytest.raises(LaneStopped):
        queued.wait()
    close(one, other)
    close(one, other)


def test_spans_have_their_bytes(lanes: tuple[Lane, Lane]) -> None:
    trace = Trace()
    lane = Lane("kv_out", trace, torch.device("cpu"))
    for size in (5, 7):
        lane.submit("x", lambda size=size: size).wait()  # type: ignore[misc]
    close(lane, *lanes)
    assert trace.bytes["kv_out"] == 12
    assert [span.bytes for span in trace.spans] == [5, 7]
    assert all(span.end >= span.begin for span in trace.spans)
    assert set(trace.summary(1.0)["kv_out"]) == {"busy_seconds", "share", "bytes"}


def test_ticket_of_the_caller() -> None:
    ticket = Ticket()
    threading.Timer(0.02, ticket.finish).start()
    ticket.wait()
