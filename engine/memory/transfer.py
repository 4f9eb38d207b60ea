"""Streams: threads that carry loads and stores while the computation goes on.

A stream begins its jobs in order, one at a time or a few at once. A job may wait for jobs of other streams;
waiting is done on `Ticket`s. On CUDA each stream has a CUDA stream of its own and tickets carry events, so
that waiting orders the streams and never blocks the host more than needed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch

from engine.kernels.cpu.native import work_alone
from engine.trace import Trace


class StreamStopped(Exception):
    """The job was skipped because another one failed or the run is being closed."""


class Ticket:
    """Stands for a job: something to wait for, which raises the job's error."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._event: torch.cuda.Event | None = None

    def finish(self, error: BaseException | None = None, event: torch.cuda.Event | None = None) -> None:
        """Mark the job as done, on a CUDA stream once ``event`` is reached, or as failed."""
        self._error, self._event = error, event
        self._done.set()

    def synchronize(self) -> None:
        """Block until the job and its copies are done.

        Raises:
            BaseException: what the job raised.
        """
        self.wait()
        if self._event is not None:
            self._event.synchronize()

    def wait(self) -> None:
        """Block until the job is done, and make the current CUDA stream wait for its copies.

        Raises:
            BaseException: what the job raised.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Stream:
    """Runs jobs in order, each as a span of the trace; several threads begin them in order."""

    def __init__(self, name: str, trace: Trace, device: torch.device, threads: int = 1) -> None:
        self.name = name
        self._trace, self._device = trace, device
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], int], Sequence[Ticket], Ticket] | None] = (
            queue.SimpleQueue()
        )
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"stream-{name}", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, what: str, job: Callable[[], int], after: Sequence[Ticket] = ()) -> Ticket:
        """Queue a job that returns the bytes it moved; it starts once all of ``after`` are done.

        These must have been submitted before, so that a job never waits for one that comes later.
        """
        ticket = Ticket()
        self._jobs.put((what, job, after, ticket))
        return ticket

    def stop(self) -> None:
        """Skip what is queued; jobs not begun end with `StreamStopped`."""
        self._stopped = True

    def close(self) -> None:
        """Stop and wait for the threads to end."""
        self.stop()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        work_alone()  # the other cores belong to the computation
        cuda_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with torch.inference_mode(), torch.cuda.stream(cuda_stream):
            while (item := self._jobs.get()) is not None:
                what, job, after, ticket = item
                try:
                    if self._stopped:
                        raise StreamStopped
                    for other in after:
                        other.wait()
                    with self._trace.span(self.name, what) as span:
                        span.bytes = job()
                    event = cuda_stream.record_event() if cuda_stream is not None else None
                    ticket.finish(event=event)
                except BaseException as error:
                    ticket.finish(error=error)
            if cuda_stream is not None:
                cuda_stream.synchronize()  # buffers may be freed once the stream is closed
