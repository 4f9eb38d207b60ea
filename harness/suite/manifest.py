"""What a policy's results are: the manifest that lies beside its journal.

It knows the engine's record and the versions of packages; it does not know runs or requests.

It is written after the first pass and then once a second, so that of a killed process all but the last
second is known. ``created``, ``command`` and every figure in seconds or per second may differ when a suite is
repeated; what the engine's records count also depends on where a suite was interrupted; the rest may not.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from engine.spec.fields import FieldError, read_fields
from engine.spec.hardware import Tier
from engine.spec.record import EngineRecord
from engine.spec.request import CallProgress
from harness.files import read_json, write_json
from harness.identity import SHORT, Identity

SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """What a policy's results are."""

    suite: str
    policy: str
    """Its name."""

    run_entries: Sequence[str]
    """Those of the last run of the suite."""

    runs: Mapping[str, str]
    """Digest of what each finished run was asked and how it was scored, by the run's name."""

    created: str
    """Time of the last run, ISO 8601 in UTC."""

    seeds: Mapping[str, Any]
    """Of sampling and of random weights."""

    command: str
    identity: str
    """Digest of all that the answers and their times depend on; see `harness.identity`."""

    engine: EngineRecord
    """Of the last time that the engine ran."""

    earlier_sessions: Sequence[EngineRecord]
    """Records of interrupted or smaller runs under the same identity."""

    versions: Mapping[str, str | None]
    """Of packages that build and score requests; None where one is not installed."""

    identities: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The parts of all identities whose answers the journal holds, by the beginnings of their keys."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Digest of HELM's files of each finished run, by its name; damaged ones are written again."""

    chat: Literal["on", "off"] = "off"
    """Whether prompts were put as a user's message into the tokenizer's chat template. Answers are kept under
    the tokens of their prompts, so that one that was asked in another way is not taken for this one."""

    schema: int = SCHEMA

    @property
    def sessions(self) -> Sequence[EngineRecord]:
        """All records, the latest first."""
        return (self.engine, *self.earlier_sessions)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Most bytes that were held in each tier in any session."""
        return {tier.value: max(s.memory[tier.value].peak for s in self.sessions) for tier in Tier}

    @property
    def process_peak(self) -> int | None:
        """Most resident bytes of the whole process in any session; None where none says."""
        return max((s.process.peak_rss for s in self.sessions if s.process), default=None)

    def continuing(self, before: Manifest | None, ran: bool) -> Manifest:
        """The same, with runs and sessions of the manifest that is already there, if its answers are these.

        Args:
            ran: whether the engine answered anything this time; otherwise its last record stays.
        """
        if before is None:
            return self
        now = replace(self, identities={**before.identities, **self.identities})
        if before.identity != self.identity:
            return now
        if not ran:
            now = replace(now, engine=before.engine, earlier_sessions=before.earlier_sessions)
        else:
            now = replace(now, earlier_sessions=[*before.earlier_sessions, before.engine])
        return replace(now, runs=before.runs, files=before.files)

    def with_run(self, name: str, digest: str, files: str) -> Manifest:
        """The same, with a run that is finished, and the digest of its files."""
        return replace(self, runs={**self.runs, name: digest}, files={**self.files, name: files})

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        content = {one.name: getattr(self, one.name) for one in fields(self)}
        content["engine"] = self.engine.to_json()
        content["earlier_sessions"] = [record.to_json() for record in self.earlier_sessions]
        return content

    @classmethod
    def from_json(cls, content: Any) -> Manifest:
        """Read back what `to_json` made.

        Raises:
            FieldError: naming the field that is missing or damaged.
        """
        return read_fields(cls, content)


def make_manifest(
    suite: str,
    policy: str,
    identity: Identity,
    run_entries: Sequence[str],
    seed: int,
    record: EngineRecord,
    chat: bool = False,
) -> Manifest:
    """Describe a policy's results, as if there were none yet."""
    return Manifest(
        suite=suite,
        policy=policy,
        run_entries=list(run_entries),
        runs={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seeds={"sampling": seed, "random_weights": seed},
        command=shlex.join(sys.argv),
        identity=identity.digest,
        engine=record,
        earlier_sessions=[],
        versions={name: package_version(name) for name in ("crfm-helm", "datasets")},
        identities={identity.short: identity.to_dict()},
        chat="on" if chat else "off",
    )


def keep_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, and a copy of it beside it: times and peaks are nowhere else.

    Raises:
        StorageError: if it cannot be written.
    """
    for place in (path, _copy_of(path)):
        write_json(place, manifest.to_json())


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest, or its copy where it is damaged; None where there is neither.

    Raises:
        StorageError: if there is one that cannot be read.
    """
    for place in (path, _copy_of(path)):
        try:
            return Manifest.from_json(read_json(place))
        except FieldError:
            continue
    return None


def _copy_of(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def kept_date(manifests: Iterable[Path]) -> date | None:
    """The earliest day that a chat template showed in the runs that these manifests describe, if any.

    Raises:
        StorageError: if one is there that cannot be read.
    """
    shown = set()
    for path in manifests:
        if (kept := read_manifest(path)) and kept.identities:
            shown.add(kept.identities.get(kept.identity[:SHORT], {}).get("date", ""))
    try:
        return date.fromisoformat(min(shown - {""}, default=""))
    except ValueError:
        return None


def unfinished(record: EngineRecord, state: CallProgress) -> EngineRecord:
    """The engine's record in the middle of its first call, with what that call has done so far.

    The engine itself adds a call to its totals when the call ends.
    """
    totals = replace(
        record.totals,
        requests=state.finished,
        passes=state.passes,
        prompt_tokens=state.prompt_tokens,
        generated_tokens=state.generated_tokens,
        seconds=state.seconds,
    )
    streams = {
        name: replace(stream, share=stream.busy_seconds / state.seconds if state.seconds else 0.0)
        for name, stream in record.streams.items()
    }
    return replace(record, totals=totals, streams=streams)


def package_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
