"""The parent's side: one child process under a memory limit, which answers requests in JSON lines.

It knows processes, pipes and how they end, and nothing about the requests. Whatever a child does (hang, die,
be killed for memory, print garbage) becomes a `ChildError` that says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from engine.errors import printable, storage_errors
from engine.files.documents import DocumentError, parse_json
from engine.files.scratch import Scratch
from harness.baselines.sandbox.cgroup import MemoryGroup

LONGEST_LINE = 256 << 20
"""Longest accepted answer in bytes."""

_READ = 1 << 16
_SAID = 12
_PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes of the machine's memory, which as a limit has no effect."""


class ChildError(Exception):
    """A child did not give a usable answer.

    Attributes:
        status: out_of_memory, timeout, unsupported, refused or failed.
        said: the last lines of its standard error.
    """

    def __init__(self, status: str, reason: str, said: Sequence[str] = ()) -> None:
        self.status, self.reason, self.said = status, reason, list(said)
        super().__init__(reason)


class Child:
    """A running child process; as a context manager it ends the child.

    Attributes:
        command: the command line without the part that puts it under the limit.
        enforced: what enforces the limit ("cgroup v1"), or why nothing does.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        limit: int | None = None,
        env: Mapping[str, str] | None = None,
        root: Path = Path("/sys/fs/cgroup"),
        scratch: Scratch | None = None,
    ) -> None:
        """Start the child.

        Args:
            log: file for its standard error.
            limit: memory limit in bytes, page cache included.
            env: its whole environment.
            scratch: a folder for the child, removed when the child has ended.

        Raises:
            ChildError: if it cannot be started.
            StorageError: if the log cannot be written.
        """
        self.scratch = scratch
        self.command = list(command)
        self._group: MemoryGroup | None = None
        self.enforced = "no limit asked for"
        try:  # without a limit the group still measures the peak
            self._group = MemoryGroup(_PHYSICAL if limit is None else limit, root)
            if limit is not None:
                self.enforced = f"cgroup v{self._group.version}"
        except OSError as error:
            if limit is not None:
                self.enforced = f"not enforced: {error}"
        self._log: IO[bytes] | None = None
        self._next = 0
        self._buffer = b""
        started = self._group.inside(command) if self._group else self.command
        try:
            with storage_errors(log, "write"):
                self._log = log.open("wb+")
            self._process = subprocess.Popen(
                started, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                start_new_session=True,
            )  # fmt: skip
        except BaseException as error:
            self._release()
            if not isinstance(error, OSError):
                raise
            raise ChildError("failed", f"{command[0]} cannot be started: {error.strerror}") from error

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def ask(self, what: str, timeout: float, **content: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            ChildError: for everything else; the child is dead then, except after unsupported and refused.
        """
        self._next += 1
        line = json.dumps({"id": self._next, "do": what, **content}) + "\n"
        deadline = time.monotonic() + timeout
        try:
            self._send(line.encode(), deadline)
            text = self._line(deadline)
        except TimeoutError:
            raise self._failed("timeout", f"no answer to {what} within {timeout:g} s") from None
        except (BrokenPipeError, EOFError):
            raise self._died(what) from None
        try:
            answer = parse_json(text, finite=False)
        except DocumentError:
            answer = None
        if not isinstance(answer, dict) or answer.get("id") != self._next:
            shown = text[:80].decode("utf-8", "replace").strip()
            raise self._failed("failed", f"its answer to {what} is not one: {shown!r}")
        if not answer.get("ok"):
            reason = answer.get("reason")
            status = reason if reason in ("unsupported", "refused") else "failed"
            raise ChildError(status, printable(str(answer.get("error")))[:500], self.said())
        return answer

    def counted(self) -> tuple[int, int]:
        """Bytes that its processes have read from and written to storage so far."""
        processes = self._group.processes() if self._group else [self._process.pid]
        read = written = 0
        for process in processes or [self._process.pid]:
            with contextlib.suppress(OSError, ValueError):
                lines = Path(f"/proc/{process}/io").read_text(encoding="utf-8").splitlines()
                io = dict(line.split(": ") for line in lines)
                read += int(io["read_bytes"])
                written += int(io["write_bytes"]) - int(io["cancelled_write_bytes"])
        return read, max(written, 0)

    def peak(self) -> int:
        """Peak bytes so far, page cache included; 0 where no control group counts them."""
        return self._group.peak() if self._group else 0

    def said(self) -> list[str]:
        """The last lines of its standard error."""
        assert self._log is not None
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 8192))
        text = self._log.read().decode("utf-8", "replace").replace("\r", "\n")
        return [line for line in text.splitlines() if line.strip()][-_SAID:]

    def close(self) -> None:
        """End the child, by request if it answers, and everything that it has started."""
        if self._process.poll() is None and self._next:
            with contextlib.suppress(ChildError, OSError):
                self.ask("end", 5.0)
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._release()

    def _send(self, data: bytes, deadline: float) -> None:
        """Write, but never beyond the deadline: the child may not be reading."""
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        while data:
            if not select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(pipe, data[:_READ]) :]

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        pieces = [self._buffer]
        size = len(self._buffer)
        while b"\n" not in pieces[-1]:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(pipe, _READ)
            if not piece:
                raise EOFError
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST_LINE:
                raise self._failed("failed", f"its answer is longer than {LONGEST_LINE} bytes")
        line, _, self._buffer = b"".join(pieces).partition(b"\n")
        return line

    def _died(self, what: str) -> ChildError:
        """Why the child is gone; a kill for lack of memory takes precedence."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        code = self._process.poll()
        if self._group is not None and self._group.oom_kills():
            return self._failed("out_of_memory", f"killed for memory in {what}")
        if code is not None and code < 0:
            return self._failed("failed", f"ended by {signal.Signals(-code).name} in {what}")
        said = self.said()
        return self._failed("failed", f"ended with code {code} in {what}{': ' + said[-1] if said else ''}")

    def _failed(self, status: str, reason: str) -> ChildError:
        """End the child and return the error."""
        if status != "out_of_memory" and self._group is not None and self._group.oom_kills():
            status, reason = "out_of_memory", f"killed for memory ({reason})"
        self._kill()
        return ChildError(status, reason, self.said())

    def _kill(self) -> None:
        """Kill it with its descendants, which are in its session or in its group."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in self._group.processes() if self._group else []:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def _release(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._group is not None:
            self._group.remove()
        if self.scratch is not None:
            self.scratch.close()
