"""When each stream was busy: spans, busy shares, and a trace that browsers show.

Times are of the host's clock. On CUDA a compute span is the time to issue the work, plus the wait for it
where a pass reads its results.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from engine.files.whole import sealed, write_whole
from engine.spec.record import StreamRecord

STREAMS = ("compute", "weights", "kv_in", "kv_out")
"""The streams of every run, in the order in which they are shown; others follow when first used."""

_MAX_SPANS = 50_000


@dataclass(slots=True)
class Span:
    """One job on one stream, timed as a context manager; a generator would cost twice as much."""

    trace: Trace
    stream: str
    what: str
    begin: float
    """Seconds since the trace began, as is ``end``."""

    end: float = 0.0
    bytes: int = 0

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        self.end = self.trace.now()
        self.trace.add(self)


class Trace:
    """Collects spans from all streams; keeps the first 50,000 and the sums of all."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.busy = dict.fromkeys(STREAMS, 0.0)
        self.bytes = dict.fromkeys(STREAMS, 0)
        self.dropped = 0
        self._ended: dict[str, float] = {}
        self._zero = time.perf_counter()
        self._lock = threading.Lock()

    def span(self, stream: str, what: str) -> Span:
        """Time what happens inside; the caller may set the span's bytes.

        Where two jobs of a stream overlap, the one that ends later counts from the end of the other.
        """
        return Span(self, stream, what, self.now())

    def now(self) -> float:
        """Seconds since the trace began."""
        return time.perf_counter() - self._zero

    def add(self, span: Span) -> None:
        """Add a span that has ended."""
        with self._lock:
            before = self._ended.get(span.stream, 0.0)
            self._ended[span.stream] = max(before, span.end)
            span.begin = min(max(span.begin, before), span.end)
            self.busy[span.stream] = self.busy.get(span.stream, 0.0) + span.end - span.begin
            self.bytes[span.stream] = self.bytes.get(span.stream, 0) + span.bytes
            if len(self.spans) < _MAX_SPANS:
                self.spans.append(span)
            else:
                self.dropped += 1

    def summary(self, seconds: float) -> dict[str, StreamRecord]:
        """Per stream: busy seconds, their share of ``seconds``, bytes moved."""
        return {
            stream: StreamRecord(busy, busy / seconds if seconds else 0.0, self.bytes[stream])
            for stream, busy in self.busy.items()
        }

    def write_chrome(self, path: Path) -> None:
        """Write the spans in the trace-event format that Chrome and Perfetto open, whole or not at all.

        Raises:
            StorageError: if the file cannot be written.
        """
        streams = list(self.busy)
        events: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": index, "args": {"name": stream}}
            for index, stream in enumerate(streams)
        ]
        events += [
            {
                "name": span.what, "cat": span.stream, "ph": "X", "pid": 0, "tid": streams.index(span.stream),
                "ts": round(span.begin * 1e6, 1), "dur": round((span.end - span.begin) * 1e6, 1),
                "args": {"bytes": span.bytes},
            }
            for span in self.spans
        ]  # fmt: skip
        content = sealed({"traceEvents": events, "otherData": {"dropped_spans": self.dropped}})
        write_whole(path, json.dumps(content))
