"""Reads a suite's folder into the nouns of its report, and refuses what is damaged by file and field.

It knows table.json, the manifests and the traces; it does not know how any of it will be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.errors import UsageError
from engine.spec.hardware import Tier
from engine.spec.record import EngineRecord, StreamRecord, TierRecord
from engine.units import format_bytes
from harness.files import digest_of_files
from harness.report.inputs.data import Excerpt, PolicyResult, ResultTable, StoredSpan, SuiteResults
from harness.report.inputs.json_file import Document, flat, numbers
from harness.suite.manifest import Manifest

_MOST_SPANS = 320


def read_suite(suite_dir: Path) -> SuiteResults:
    """Read a suite's table, and the manifest and trace of every policy in it.

    Raises:
        UsageError: if a file is missing or damaged; the message names the file and the field.
    """
    document = Document.read(suite_dir / "table.json")
    document.check_schema()
    table = document.as_a(ResultTable)
    if not table.rows:
        raise UsageError(f"{document.path} has no rows: run the suite again")
    results = tuple(replace(row, folder=_folder(suite_dir, row.run_name)) for row in table.rows)
    by_policy = {}
    for path in sorted((suite_dir / "policies").glob("*/manifest.json")):
        document = Document.read(path)
        document.check_schema()
        manifest = document.as_a(Manifest)
        by_policy[manifest.policy] = manifest, path.with_name("trace.json")
        _check_files(suite_dir, manifest)
    policies = []
    for name in dict.fromkeys(result.policy for result in results):
        if name not in by_policy:
            raise UsageError(
                f"{suite_dir / 'policies'} has no manifest.json of policy {name!r}: run the suite again"
            )
        policies.append(_policy_run(name, *by_policy[name]))
    return SuiteResults(table.suite, results, tuple(policies))


def _folder(suite_dir: Path, name: str) -> Path | None:
    """Where a run is, if its name is that of a folder right there."""
    if not name or name.startswith(".") or Path(name).name != name or "\0" in name:
        return None
    return suite_dir / name if (suite_dir / name).is_dir() else None


def _check_files(suite_dir: Path, manifest: Manifest) -> None:
    """Refuse HELM's files that are not what was written; a run whose files are not there has none to show."""
    for name, digest in manifest.files.items():
        folder = _folder(suite_dir, name)
        if folder is not None and digest_of_files(folder) != digest:
            raise UsageError(f"files in {folder} are missing or damaged: run the suite again")


def _policy_run(name: str, manifest: Manifest, trace: Path) -> PolicyResult:
    engine, sessions = manifest.engine, manifest.sessions
    totals = [session.totals for session in sessions]
    seconds = sum(total.seconds for total in totals)
    stored = engine.to_json()
    return PolicyResult(
        name=name,
        kind=engine.kind,
        definition=flat(engine.policy),
        placement=engine.placement,
        tiers={tier.value: _tier(tier.value, sessions) for tier in Tier},
        streams={name: _stream(name, sessions, seconds) for session in sessions for name in session.streams},
        requests=sum(total.requests for total in totals),
        passes=sum(total.passes for total in totals),
        prompt_tokens=sum(total.prompt_tokens for total in totals),
        generated_tokens=sum(total.generated_tokens for total in totals),
        seconds=seconds,
        load_seconds=sum(total.load_seconds for total in totals),
        sessions=len(sessions),
        model={**flat(stored["model"]), "chat template": manifest.chat},
        hardware=flat(stored["hardware"]),
        software=flat({**engine.software, **manifest.versions}),
        provenance={
            "created": manifest.created,
            "command": manifest.command,
            **{f"seed of {key}": str(value) for key, value in manifest.seeds.items()},
            **_process(engine),
        },
        excerpt=_excerpt(trace),
        stored=flat(stored["stored"]),
        predicted=numbers(stored.get("predicted", {})),
        measured=numbers(stored),
    )


def _process(engine: EngineRecord) -> dict[str, str]:
    """The peak of the process up to the end of this policy, everything in it included."""
    process = engine.process
    return {"peak memory of the process": format_bytes(process.peak_rss)} if process else {}


def _tier(tier: str, sessions: Sequence[EngineRecord]) -> TierRecord:
    memory = [session.memory[tier] for session in sessions]
    return TierRecord(memory[0].budget, max(use.planned for use in memory), max(use.peak for use in memory))


def _stream(name: str, sessions: Sequence[EngineRecord], seconds: float) -> StreamRecord:
    streams = [session.streams[name] for session in sessions if name in session.streams]
    busy = sum(stream.busy_seconds for stream in streams)
    bounds = [stream.bound_seconds for stream in streams if stream.bound_seconds is not None]
    moved = sum(stream.bytes for stream in streams)
    return StreamRecord(busy, busy / seconds if seconds else 0.0, moved, sum(bounds) if bounds else None)


def _excerpt(path: Path) -> Excerpt | None:
    """The pass of median length from a Chrome trace, cut after a few hundred steps."""
    if not path.exists():
        return None
    trace = Document.read(path)
    spans = []
    for event in trace.parts("traceEvents"):
        if event.text("ph") == "X":
            begin = event.number("ts") / 1e6
            spans.append(
                StoredSpan(event.text("cat"), event.text("name"), begin, begin + event.number("dur") / 1e6)
            )
    spans.sort(key=lambda span: span.begin)
    starts = [span.begin for span in spans if span.stream == "compute" and span.name.endswith(" 0.0")]
    if not starts:
        return None
    ends = [*starts[1:], max(span.end for span in spans)]
    lengths = sorted(zip([e - s for s, e in zip(starts, ends, strict=True)], starts, ends, strict=True))
    _, begin, end = lengths[len(lengths) // 2]
    inside = [span for span in spans if span.end > begin and span.begin < end]
    whole = len(inside) <= _MOST_SPANS
    if not whole:
        inside = inside[:_MOST_SPANS]
        end = max(span.begin for span in inside)
    shown = tuple(
        StoredSpan(s.stream, s.name, max(s.begin, begin) - begin, min(s.end, end) - begin)
        for s in inside
        if s.begin < end
    )
    return Excerpt(shown, end - begin, len(starts), whole)
