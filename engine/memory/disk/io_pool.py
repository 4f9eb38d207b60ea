"""A few threads that carry out requests to the disk, shared by the files of one run.

The caller with the fewest requests left is served first: the KV cache of the next device batch does not wait
for the weights of the next layer, which are requested long before they are needed. No caller starves, as
each has one call at a time. This module does not know what a request does.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from engine.memory.disk.aligned import small_buffer
from engine.spec.rates import IN_FLIGHT
from engine.units import KIB, MIB

THREADS = IN_FLIGHT
REQUEST_BYTES = 2 * MIB
"""Every caller may have to wait for a request that has begun; larger ones were no faster."""

BOUNCE_BYTES = 256 * KIB
"""Size of the bounce buffers, for pieces whose offset or address is not aligned."""

UNSYNCED_BYTES = 32 * MIB
"""Max bytes in the page cache that wait to be written, where the file system refuses direct I/O."""


class _Call:
    """The requests of one caller."""

    def __init__(self, requests: Sequence[Callable[[], object]]) -> None:
        self.waiting = deque(requests)
        self.in_flight = 0
        self.error: BaseException | None = None
        self.ended = threading.Event()


class IOPool:
    """Threads ``io-N``, started when first needed.

    Attributes:
        threads: max requests in flight, besides callers' single ones.
        request_bytes: max bytes of one request.
        refusals: per device number and open flags, why direct I/O is refused; empty where it is not.
    """

    def __init__(self, threads: int = THREADS, request_bytes: int = REQUEST_BYTES) -> None:
        self.threads, self.request_bytes = threads, request_bytes
        self._calls: list[_Call] = []  # those with requests that have not begun
        self._workers: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._bounces: list[memoryview] = []
        self._unsynced: dict[Callable[[], None], int] = {}
        self.refusals: dict[tuple[int, int], str] = {}

    def run(self, requests: Sequence[Callable[[], object]]) -> None:
        """Carry out all requests; when this returns or raises, none of them is in flight.

        A single request is carried out by the calling thread.

        Raises:
            BaseException: the first that a request raised, or that interrupted the wait; requests that have
                not begun by then are skipped.
        """
        if len(requests) < 2:
            for request in requests:
                request()
            return
        self.run_in_threads(requests)

    def run_in_threads(self, requests: Sequence[Callable[[], object]]) -> None:
        """As `run`, but in the pool's threads even if there is only one request; at least one."""
        call = _Call(requests)
        try:
            with self._changed:
                while len(self._workers) < self.threads:
                    name = f"io-{len(self._workers)}"
                    self._workers.append(threading.Thread(target=self._work, name=name, daemon=True))
                    self._workers[-1].start()
                self._calls.append(call)
                self._changed.notify_all()
            call.ended.wait()
        except BaseException:
            self._abandon(call)
            raise
        if call.error is not None:
            raise call.error

    def share(self, total: int) -> int:
        """Bytes per request if ``total`` bytes are to be moved: a part per thread unless parts get small."""
        part = -(-total // self.threads)
        return min(self.request_bytes, max(MIB, -(-part // 4096) * 4096))

    @contextlib.contextmanager
    def bounce(self) -> Iterator[memoryview]:
        """Lend an aligned buffer of `BOUNCE_BYTES`."""
        try:
            buffer = self._bounces.pop()
        except IndexError:
            buffer = small_buffer(BOUNCE_BYTES)
        try:
            yield buffer
        finally:
            self._bounces.append(buffer)

    def note_unsynced(self, flush: Callable[[], None], count: int) -> Sequence[Callable[[], None]]:
        """Note ``count`` bytes written through the page cache, which ``flush`` brings to the disk.

        Returns what is to be flushed now: nothing until `UNSYNCED_BYTES` of all files wait.
        """
        with self._changed:
            self._unsynced[flush] = self._unsynced.get(flush, 0) + count
            if sum(self._unsynced.values()) < UNSYNCED_BYTES:
                return ()
            waiting = list(self._unsynced)
            self._unsynced.clear()
            return waiting

    def forget(self, flush: Callable[[], None]) -> None:
        """Drop the note about a file that is being closed."""
        with self._changed:
            self._unsynced.pop(flush, None)

    def describe(self) -> str:
        """How the disk has been read and written so far, for the record of a run."""
        reasons = {reason for reason in self.refusals.values() if reason}
        if reasons:
            return f"buffered: {', '.join(sorted(reasons))}"
        return "direct" if self.refusals else "unused"

    def close(self) -> None:
        """Wait for the requests and end the threads; they start again with the next request."""
        with self._changed:
            workers, self._workers = self._workers, []
            self._changed.notify_all()
        for worker in workers:
            worker.join()
        self._bounces.clear()

    def _abandon(self, call: _Call) -> None:
        """Skip what has not begun and wait for what has, however often that is interrupted."""
        while True:
            try:
                with self._changed:
                    self._skip(call)
                    if not call.in_flight:
                        return
                call.ended.wait()
            except KeyboardInterrupt:
                continue

    def _skip(self, call: _Call) -> None:
        """Forget the requests that have not begun."""
        call.waiting.clear()
        if call in self._calls:
            self._calls.remove(call)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    if threading.current_thread() not in self._workers:
                        return
                    self._changed.wait()
                call = min(self._calls, key=lambda one: len(one.waiting))
                request = call.waiting.popleft()
                call.in_flight += 1
                if not call.waiting:
                    self._calls.remove(call)
            error: BaseException | None = None
            try:
                request()
            except BaseException as caught:
                error = caught
            del request
            with self._changed:
                call.in_flight -= 1
                if error is not None:
                    call.error = call.error or error
                    self._skip(call)
                if not call.in_flight and not call.waiting:
                    call.ended.set()
            del call, error
