"""Streams run jobs in order, tickets raise their failures, and threads end."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
import torch

from engine.kernels.cpu import native
from engine.memory.transfer import Stream, StreamStopped, Ticket
from engine.spec.record import StreamRecord
from engine.trace import Trace
from tests.support.engine_runs import stream_threads


@pytest.fixture
def streams() -> tuple[Stream, Stream]:
    """Two streams that share a trace."""
    trace = Trace()
    return Stream("weights", trace, torch.device("cpu")), Stream("kv_in", trace, torch.device("cpu"))


def close(*streams: Stream) -> None:
    """Close streams; no thread of theirs may be left."""
    for stream in streams:
        stream.close()
    assert stream_threads() == []


def test_jobs_run_in_order_and_wait_for_other_streams(streams: tuple[Stream, Stream]) -> None:
    one, other = streams
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


@pytest.mark.skipif(not native.available(), reason=native.reason())
def test_a_stream_has_no_threads_of_its_own_and_leaves_the_others(streams: tuple[Stream, Stream]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found: list[int] = []
    try:
        stream = Stream("kv_out", Trace(), torch.device("cpu"))
        stream.submit("a", lambda: found.append(torch.get_num_threads()) or 0).wait()
        assert (found, torch.get_num_threads()) == ([1], 3)
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [1, 3]
    finally:
        torch.set_num_threads(before)
    close(stream, *streams)


def test_failure_reaches_whoever_waits_and_what_comes_after(streams: tuple[Stream, Stream]) -> None:
    one, other = streams
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


def test_stopped_stream_skips_what_has_not_begun(streams: tuple[Stream, Stream]) -> None:
    one, other = streams
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
    with pytest.raises(StreamStopped):
        queued.wait()
    close(one, other)
    close(one, other)


def test_spans_have_their_bytes(streams: tuple[Stream, Stream]) -> None:
    trace = Trace()
    stream = Stream("kv_out", trace, torch.device("cpu"))
    for size in (5, 7):
        stream.submit("x", lambda size=size: size).wait()  # type: ignore[misc]
    close(stream, *streams)
    assert trace.bytes["kv_out"] == 12
    assert [span.bytes for span in trace.spans] == [5, 7]
    assert all(span.end >= span.begin for span in trace.spans)
    assert trace.summary(1.0)["kv_out"] == StreamRecord(trace.busy["kv_out"], trace.busy["kv_out"], 12)


def test_ticket_of_the_caller() -> None:
    ticket = Ticket()
    threading.Timer(0.02, ticket.finish).start()
    ticket.wait()


def test_two_jobs_of_one_stream_overlap_and_their_spans_do_not(streams: tuple[Stream, Stream]) -> None:
    trace = Trace()
    stream = Stream("weights", trace, torch.device("cpu"), threads=2)
    both = threading.Barrier(2, timeout=10)

    def job() -> int:
        both.wait()  # for ever, if the second began only after the first
        return 4

    for ticket in [stream.submit("x", job) for _ in range(4)]:
        ticket.wait()
    close(stream, *streams)
    assert trace.bytes["weights"] == 16 and len(trace.spans) == 4
    spans = sorted((span.begin, span.end) for span in trace.spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert trace.busy["weights"] == pytest.approx(sum(end - begin for begin, end in spans))


def test_a_job_that_waits_holds_up_none_that_it_waits_for(streams: tuple[Stream, Stream]) -> None:
    """Both threads of a stream may wait; what they wait for was submitted before and is under way."""
    one, other = streams
    stream = Stream("weights", Trace(), torch.device("cpu"), threads=2)
    gate = threading.Event()
    first = other.submit("a", lambda: int(gate.wait(10)))
    second = stream.submit("b", lambda: 0, after=[first])
    third = stream.submit("c", lambda: 0, after=[second])
    fourth = stream.submit("d", lambda: 0, after=[third])
    gate.set()
    fourth.wait()
    close(stream, one, other)
