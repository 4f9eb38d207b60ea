"""The one face of every system that is compared: what it is, and what it does in its child process.

It knows tokens, seconds and settings; not which process calls it, what is measured around it, or text.
Only the standard library is imported, as every environment imports this module.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]
Ids = Sequence[Sequence[int]]
"""Token ids of several sequences."""


class Unsupported(Exception):
    """The system cannot run this model or setting at all; the text says why."""


class Refused(Exception):
    """The system itself says that the request does not fit its memory; the text says what is lacking."""


@dataclass(frozen=True)
class Job:
    """What a child is to prepare or load. Travels as JSON."""

    model: str
    """Folder of the checkpoint: config.json and safetensors, the same for every system."""

    work: str
    """Folder for what is derived from the checkpoint and for offloaded weights; the system's own."""

    settings: Settings = field(default_factory=dict)
    """By name, all of them: defaults, configuration, variant and the reader's overrides."""

    threads: int = 1
    device: str = "cpu"
    """cpu or cuda."""

    cap_bytes: int | None = None
    """Limit of host memory, page cache included, that is enforced from outside; None is no limit."""

    batch: int = 1
    prompt_len: int = 1
    new_tokens: int = 1
    """The largest request that will come: sequences, tokens of each prompt, tokens to generate."""


@dataclass(frozen=True)
class Generated:
    """What one call generated, and how long it took."""

    tokens: list[list[int]]
    """New ids only, as many as asked for, in the order of the prompts."""

    prefill_s: float
    """Seconds until every sequence had its first new token."""

    decode_s: float
    """Seconds from there to the last token."""


@dataclass(frozen=True)
class Configuration:
    """One way to run a system that gets rows of its own."""

    settings: Settings = field(default_factory=dict)
    bits: int = 16
    """Of a weight, to the nearest of 16 (full precision, float32 too), 8 and 4: only equals are compared."""

    variants: Sequence[Settings] = ({},)
    """Documented alternatives that change speed only; a short probe keeps the fastest that runs."""


class Baseline(ABC):
    """One system. Class attributes are facts that the parent reads; methods run in the child.

    A child makes one instance and calls `prepare` alone, or `load` and then `generate` and `score` as
    often as it likes.
    """

    name: str
    title: str
    choices: str
    """Which choices were made for this system, and why, in a paragraph."""

    requirements: Sequence[str] = ()
    """Pinned packages of its own environment; none: it runs in ours."""

    later_requirements: Sequence[str] = ()
    """Packages that are built against the others and installed after them, without build isolation."""

    unwanted: Sequence[str] = ()
    """Packages that the requirements bring and that break them; removed again."""

    build_environment: Mapping[str, str] = {}
    needs: str = ""
    """What an installation needs beside pip, in words."""

    packages: Sequence[str] = ()
    """Packages whose versions are reported."""

    devices: Sequence[str] = ("cpu", "cuda")
    defaults: Settings = {}
    """Every setting with its default; a reader's ``--set`` may change only these."""

    configurations: Mapping[str, Configuration] = {"full": Configuration()}
    default_configurations: Sequence[str] = ("full",)
    prepare_is_capped = False
    """Whether `prepare` runs under the memory limit; not, where documentation has it done beforehand."""

    not_run: str = ""
    """Why this system cannot run at all with what can be installed; empty where it can."""

    def variants(self, configuration: str, capped: bool) -> Sequence[Settings]:
        """The alternatives to probe, with or without a memory limit."""
        return self.configurations[configuration].variants

    def environment(self, folder: Path | None) -> dict[str, str]:
        """Variables that its children need; ``folder`` is its environment's, None if it runs in ours."""
        return {}

    def after_install(self, python: Path) -> Sequence[Sequence[str]]:
        """Commands that finish an installation, such as builds that must not happen under a limit."""
        return ()

    def prepare(self, job: Job) -> dict[str, Any]:
        """Derive what the system reads from the checkpoint, outside of what is timed; may do nothing.

        Returns:
            What was made, in a few words and bytes; JSON-able.

        Raises:
            Unsupported: if the system does not speak this model.
        """
        return {}

    @abstractmethod
    def load(self, job: Job) -> dict[str, Any]:
        """Load the model; returns what is worth reporting, JSON-able.

        Raises:
            Unsupported, Refused: as their names say.
        """

    @abstractmethod
    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Continue prompts of equal length greedily by exactly so many tokens; no token ends one.

        Raises:
            Unsupported, Refused: as their names say.
        """

    def score(self, sequences: Ids) -> list[list[float]]:
        """log p(token i | tokens before it) for i = 1 .. n-1 of each sequence, in nats.

        Raises:
            Unsupported: where the system gives no log-probabilities.
        """
        raise Unsupported(f"{self.name} gives no log-probabilities of a prompt")

    def device_peak(self) -> int:
        """Most bytes of accelerator memory held so far; 0 where there is none."""
        return 0

    def versions(self) -> dict[str, str]:
        """Versions of its packages in this process's environment; absent ones are left out."""
        found = {}
        for package in self.packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


class StepClock:
    """Tells prefill from decode: call it after every new token of the whole batch."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: list[float] = []

    def __call__(self) -> None:
        self.steps.append(time.perf_counter())

    def generated(self, tokens: list[list[int]]) -> Generated:
        """The result whose last token came now."""
        end = time.perf_counter()
        first = self.steps[0] if self.steps else end
        return Generated(tokens, first - self.began, end - first)


def folder_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A derived folder, made by ``make`` if it is not there; never seen half made."""
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
    """Bytes of all files below a folder, or of one file."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous_bytes() -> int:
    """Bytes of memory this process holds that are not backed by files; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == "RssAnon:"), 0)
