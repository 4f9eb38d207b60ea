"""What a campaign has in common: its random choices, its time, its counts and what failed."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.work import Command, Ended, equal, fresh, names, run


class Undisturbed(NamedTuple):
    """What a command leaves where nothing disturbs it."""

    folder: Path
    outcome: Any
    names: set[str]
    """Of all files and folders."""

    seconds: float


@dataclass
class Campaign:
    """One campaign.

    Attributes:
        folder: of the working folders; those of failed cases stay.
        seed: of every random choice; a case depends on it, its part and its number alone.
        ends: when no further case is begun, by `time.monotonic`.
    """

    folder: Path
    seed: int
    ends: float
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _wanted: dict[str, Undisturbed] = field(default_factory=dict)

    def random(self, part: str, number: int) -> random.Random:
        """The random numbers of one case."""
        return random.Random(f"{self.seed}/{part}/{number}")

    @property
    def in_time(self) -> bool:
        """Whether another case may begin."""
        return time.monotonic() < self.ends

    def undisturbed(self, command: Command) -> Undisturbed:
        """What a command leaves where nothing disturbs it; run once."""
        if command.name not in self._wanted:
            folder = fresh(command, self.folder / "undisturbed" / command.name)
            ended = run(command, folder)
            if ended.code:
                raise SystemExit(f"{command.name} fails undisturbed: {ended.last_line}")
            self._wanted[command.name] = Undisturbed(
                folder, command.outcome(folder), names(folder), ended.seconds
            )
        return self._wanted[command.name]

    def place(self, part: str, number: int) -> Path:
        """The working folder of a case."""
        return self.folder / part / str(number)

    def report(self, part: str, kind: str, place: Path, faults: list[str], cases: int = 1) -> None:
        """Count cases; their working folder is kept if anything is wrong with it."""
        self.counts[part, kind] += cases
        if not faults:
            shutil.rmtree(place, ignore_errors=True)
            return
        self.counts[part, f"{kind}: failed"] += 1
        self.failures.append(f"{part} {place.name} ({kind}): {'; '.join(faults)}")
        print(f"FAILED {self.failures[-1]}", file=sys.stderr, flush=True)

    def same_as_undisturbed(self, command: Command, place: Path, ended: Ended) -> list[str]:
        """What is wrong with a command that was disturbed and then given again."""
        if ended.code or not ended.clean:
            return [f"given again it ends with {ended.code}: {ended.last_line[:300]}"]
        wanted, found = self.undisturbed(command), names(place)
        faults = [] if equal(command.outcome(place), wanted.outcome) else ["its files differ"]
        left, lacking = found - wanted.names, wanted.names - found
        faults += [f"left behind: {', '.join(sorted(left)[:3])}"] if left else []
        return faults + ([f"lacking: {', '.join(sorted(lacking)[:3])}"] if lacking else [])

    def table(self) -> str:
        """Counts by part and kind, as Markdown."""
        lines = ["| part | kind | cases | failed |", "| --- | --- | ---: | ---: |"]
        for (part, kind), count in sorted(self.counts.items()):
            if not kind.endswith(": failed"):
                lines.append(f"| {part} | {kind} | {count:,} | {self.counts[part, f'{kind}: failed']:,} |")
        return "\n".join(lines)
