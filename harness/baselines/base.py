"""The interface of every system that is compared: facts about it, and what it does in its child process.

It knows tokens, seconds and settings; it does not know which process calls it, what is measured, or text.
Only the standard library is imported, because every system's environment imports this module.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]
Ids = Sequence[Sequence[int]]
"""Token ids, one list per sequence."""


class Unsupported(Exception):
    """The system cannot run this model or setting at all; the message says why."""


class Refused(Exception):
    """The system itself reports that its memory does not suffice; the message says what is missing."""


@dataclass(frozen=True)
class Job:
    """What a child has to prepare or load; sent to it as JSON."""

    model: str
    """Folder of the checkpoint: config.json and safetensors, the same for every system."""

    work: str
    """The system's own folder for files derived from the checkpoint, which later children use again."""

    scratch: str
    """This child's own folder for offloaded weights and cache; the parent removes it when the child ends."""

    settings: Settings = field(default_factory=dict)
    """Every setting by name: defaults, then configuration, variant and the user's overrides."""

    threads: int = 1
    device: str = "cpu"
    """cpu or cuda."""

    cap_bytes: int | None = None
    """Limit on host memory, page cache included, enforced from outside; None for no limit."""

    batch: int = 1
    prompt_len: int = 1
    new_tokens: int = 1
    """The largest request that will follow: sequences, tokens per prompt, tokens to generate."""


@dataclass(frozen=True)
class Generated:
    """What one call generated, and how long it took."""

    tokens: list[list[int]]
    """The new ids only, ``new_tokens`` per sequence, in the order of the prompts."""

    prefill_s: float
    """Seconds until every sequence had its first new token."""

    decode_s: float
    """Seconds from there to the last token."""


@dataclass(frozen=True)
class Configuration:
    """One way to run a system, which gets rows of its own."""

    settings: Settings = field(default_factory=dict)
    bits: int = 16
    """Bits per weight: 16 for full precision (float32, too), 8 or 4. Only equal bits are compared."""

    variants: Sequence[Settings] = ({},)
    """Documented alternatives that affect speed only; a short probe keeps the fastest one that runs."""


class Baseline(ABC):
    """One system. Class attributes are facts that the parent reads; methods run in the child.

    A child makes one instance and calls either `prepare`, or `load` followed by any number of calls to
    `generate` and `score`.
    """

    name: str
    title: str
    choices: str
    """Which choices were made for this system and why, in one paragraph."""

    requirements: Sequence[str] = ()
    """Pinned packages of its own environment; empty if it runs in ours."""

    later_requirements: Sequence[str] = ()
    """Packages that are built against the others: installed after them, without build isolation."""

    unwanted: Sequence[str] = ()
    """Packages that the requirements pull in and that break them; uninstalled again."""

    build_environment: Mapping[str, str] = {}
    needs: str = ""
    """What an installation needs besides pip, in words."""

    packages: Sequence[str] = ()
    """Packages whose versions are reported."""

    devices: Sequence[str] = ("cpu", "cuda")
    defaults: Settings = {}
    """Every setting with its default; ``--set`` accepts only these."""

    configurations: Mapping[str, Configuration] = {"full": Configuration()}
    default_configurations: Sequence[str] = ("full",)

    not_run: str = ""
    """Why this system cannot be run with what can be installed; empty where it can."""

    def variants(self, configuration: str, capped: bool) -> Sequence[Settings]:
        """The alternatives to probe, with or without a memory limit."""
        return self.configurations[configuration].variants

    def environment(self, folder: Path | None) -> dict[str, str]:
        """Variables that its children need; ``folder`` is its own environment's, None if it runs in ours."""
        return {}

    def after_install(self, python: Path) -> Sequence[Sequence[str]]:
        """Commands that complete an installation, such as builds that must not happen under a limit."""
        return ()

    def prepare(self, job: Job) -> dict[str, Any]:
        """Derive the files that the system reads from the checkpoint; not timed. Does nothing by default.

        Returns:
            What was made, in a few words and bytes, fit for JSON.

        Raises:
            Unsupported: if the system does not support this model.
        """
        return {}

    @abstractmethod
    def load(self, job: Job) -> dict[str, Any]:
        """Load the model and return what is worth reporting, fit for JSON.

        Raises:
            Unsupported: if the system cannot run this model or setting.
            Refused: if the system reports that its memory does not suffice.
        """

    @abstractmethod
    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Continue prompts of equal length greedily by exactly new_tokens tokens; no token ends a sequence.

        Raises:
            Unsupported, Refused: as `load`.
        """

    def score(self, sequences: Ids) -> list[list[float]]:
        """log p(token i | tokens before it) for i = 1 .. n-1 of each sequence, in nats.

        Raises:
            Unsupported: if the system does not provide log-probabilities.
        """
        raise Unsupported(f"{self.name} gives no log-probabilities of a prompt")

    def device_peak(self) -> int:
        """Peak bytes of accelerator memory so far; 0 where there is none."""
        return 0

    def versions(self) -> dict[str, str]:
        """Versions of its packages in this process's environment; missing packages are left out."""
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for package in self.packages:
            with contextlib.suppress(PackageNotFoundError):
                found[package] = version(package)
        return found


class StepClock:
    """Separates prefill from decode: call it whenever the whole batch has one more token."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: list[float] = []

    def __call__(self) -> None:
        self.steps.append(time.perf_counter())

    def generated(self, tokens: list[list[int]]) -> Generated:
        """The result, if the last token has been generated just now."""
        end = time.perf_counter()
        first = self.steps[0] if self.steps else end
        return Generated(tokens, first - self.began, end - first)


def folder_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A derived folder, filled by ``make`` if it does not exist yet; it never appears half filled."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        make(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        partial.rename(folder)
    return folder


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below, or of one file."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous_bytes() -> int:
    """Bytes of this process's memory that are not backed by files; 0 where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == "RssAnon:"), 0)
