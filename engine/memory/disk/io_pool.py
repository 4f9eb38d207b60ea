"""A few threads that carry out requests to the disk, shared by the files of one run.

Of several callers the one with the fewest requests left comes first: the KV cache of the next device batch
does not wait for weights of the next layer, which are asked for long before they are needed. None waits for
ever, as a caller has one call at a time. What a request does is not known here.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from engine.memory.disk.aligned import small_buffer
from engine.spec.rates import IN_FLIGHT
from engine.units import KIB, MIB

if TYPE_CHECKING:
    from engine.memory.disk.files import DirectFile

THREADS = IN_FLIGHT
REQUEST_BYTES = 2 * MIB
"""A request that goes on is waited for by all; larger ones were no faster."""

BOUNCE_BYTES = 256 * KIB
"""Size of the buffers through which pieces go whose place in the file or in memory is not aligned."""

UNSYNCED_BYTES = 32 * MIB
"""Most bytes that wait in the page cache to be written, where the file system refuses direct I/O."""


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
        threads: how many requests are in flight at most, beside callers' single ones.
        request_bytes: most bytes of one request.
        refusals: per device number and way of opening, why direct I/O is refused; empty where it is not.
    """

    def __init__(self, threads: int = THREADS, request_bytes: int = REQUEST_BYTES) -> None:
        self.threads, self.request_bytes = threads, request_bytes
        self._calls: list[_Call] = []  # that have requests which are not begun
        self._workers: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._bounces: list[memoryview] = []
        self._unsynced: dict[DirectFile, int] = {}
        self.refusals: dict[tuple[int, int], str] = {}

    def run(self, requests: Sequence[Callable[[], object]]) -> None:
        """Carry out all requests; when this returns or raises, none of them is going on.

        A single request is carried out by the caller itself.

        Raises:
            BaseException: the first that a request raised, or that interrupted the wait; requests not
                begun by then are left out.
        """
        if len(requests) < 2:
            for request in requests:
                request()
            return
        self.run_in_threads(requests)

    def run_in_threads(self, requests: Sequence[Callable[[], object]]) -> None:
        """As `run`, a single request included; at least one."""
        call = _Call(requests)
        try:
            with self._changed:
                self._start()
                self._calls.append(call)
                self._changed.notify_all()
            call.ended.wait()
        except BaseException:
            self._abandon(call)
            raise
        if call.error is not None:
            raise call.error

    def share(self, total: int) -> int:
        """Bytes per request if so many are to be moved: every thread gets a part unless parts are small."""
        part = -(-total // self.threads)
        return min(self.request_bytes, max(MIB, -(-part // 4096) * 4096))

    @contextlib.contextmanager
    def bounce(self) -> Iterator[memoryview]:
        """An aligned buffer of `BOUNCE_BYTES`, lent."""
        try:
            buffer = self._bounces.pop()
        except IndexError:
            buffer = small_buffer(BOUNCE_BYTES)
        try:
            yield buffer
        finally:
            self._bounces.append(buffer)

    def too_much_unsynced(self, file: DirectFile, count: int) -> list[DirectFile]:
        """Note so many bytes written through the page cache; returns the files to be synced now."""
        with self._changed:
            self._unsynced[file] = self._unsynced.get(file, 0) + count
            if sum(self._unsynced.values()) < UNSYNCED_BYTES:
                return []
            files = list(self._unsynced)
            self._unsynced.clear()
            return files

    def forget(self, file: DirectFile) -> None:
        """A file is being closed."""
        with self._changed:
            self._unsynced.pop(file, None)

    def describe(self) -> str:
        """How the disk was read and written so far, for the record of a run."""
        reasons = {reason for reason in self.refusals.values() if reason}
        if reasons:
            return f"buffered: {', '.join(sorted(reasons))}"
        return "direct" if self.refusals else "unused"

    def close(self) -> None:
        """Wait for what is asked for and end the threads; they start again if there is another request."""
        with self._changed:
            workers, self._workers = self._workers, []
            self._changed.notify_all()
        for worker in workers:
            worker.join()
        self._bounces.clear()

    def _start(self) -> None:
        while len(self._workers) < self.threads:
            name = f"io-{len(self._workers)}"
            worker = threading.Thread(target=self._work, name=name, daemon=True)
            self._workers.append(worker)
            worker.start()

    def _abandon(self, call: _Call) -> None:
        """Leave out what is not begun and wait for what is, however often that is interrupted."""
        while True:
            try:
                with self._changed:
                    self._leave_out(call)
                    if not call.in_flight:
                        return
                call.ended.wait()
            except KeyboardInterrupt:
                continue

    def _leave_out(self, call: _Call) -> None:
        """Forget the requests that are not begun."""
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
                    self._leave_out(call)
                if not call.in_flight and not call.waiting:
                    call.ended.set()
            del call, error
