"""Reads a suite's folder into the nouns of its report, and refuses what is damaged by file and field.

It knows table.json, the manifests and the traces of this version and of those before it; it does not know
how any of it will be shown. What an older version did not write is None; what is there and is not what it
should be is damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import UsageError
from engine.spec.hardware import Tier
from engine.units import format_bytes
from harness.report.inputs.data import (
    NOT_RECORDED,
    TENSOR_KINDS,
    Excerpt,
    PolicyRun,
    Result,
    Span,
    StreamUse,
    SuiteResults,
    TierUse,
)
from harness.report.inputs.json_file import Document

_MOST_SPANS = 320


def read_suite(suite_dir: Path) -> SuiteResults:
    """Read a suite's table, and the manifest and trace of every policy in it.

    Raises:
        UsageError: if a file is missing or damaged; the message names the file and the field.
    """
    table = Document.read(suite_dir / "table.json")
    table.check_schema()
    results = tuple(_result(suite_dir, row) for row in table.parts("rows"))
    if not results:
        raise UsageError(f"{table.path} has no rows: run the suite again")
    manifests = [Document.read(path) for path in sorted((suite_dir / "policies").glob("*/manifest.json"))]
    by_policy = {manifest.text("policy"): manifest for manifest in manifests}
    policies = []
    for name in dict.fromkeys(result.policy for result in results):
        if name not in by_policy:
            raise UsageError(
                f"{suite_dir / 'policies'} has no manifest.json of policy {name!r}: run the suite again"
            )
        policies.append(_policy_run(name, by_policy[name]))
    return SuiteResults(table.text("suite"), results, tuple(policies))


def _folder(suite_dir: Path, row: Document) -> Path | None:
    """Where the run of a row is, if its name is that of a folder right there."""
    name = row.maybe("run_name", row.text)
    if not name or name.startswith(".") or Path(name).name != name or "\0" in name:
        return None
    return suite_dir / name if (suite_dir / name).is_dir() else None


def _result(suite_dir: Path, row: Document) -> Result:
    return Result(
        run_entry=row.text("run_entry"),
        policy=row.text("policy"),
        metric=row.text("metric"),
        value=row.maybe("accuracy", row.number),
        low=row.maybe("low", row.number),
        high=row.maybe("high", row.number),
        interval=row.maybe("interval", row.text) or "none",
        instances=row.count("instances"),
        requests=row.maybe("requests", row.count),
        prompt_tokens=row.maybe("prompt_tokens", row.count),
        generated_tokens=row.maybe("generated_tokens", row.count),
        seconds=row.maybe("seconds", row.number),
        kind=row.kind(),
        folder=_folder(suite_dir, row),
    )


def _policy_run(name: str, manifest: Document) -> PolicyRun:
    manifest.check_schema()
    engine = manifest.part("engine")
    sessions = [
        engine,
        *(manifest.parts("earlier_sessions") if "earlier_sessions" in manifest.content else []),
    ]
    totals = [session.part_or_empty("totals") for session in sessions]
    seconds = _total(totals, "seconds")
    predicted = (engine if "predicted" in engine.content else manifest).part_or_empty("predicted")
    return PolicyRun(
        name=name,
        kind=engine.kind(),
        definition=engine.part_or_empty("policy").flat(),
        placement=_placement(engine.part_or_empty("placement")),
        tiers=tuple(_tier_use(tier, sessions) for tier in Tier),
        streams=_streams(sessions, seconds),
        requests=_count(totals, "requests"),
        passes=_count(totals, "passes"),
        prompt_tokens=_count(totals, "prompt_tokens"),
        generated_tokens=_count(totals, "generated_tokens"),
        seconds=seconds,
        load_seconds=_total(totals, "load_seconds"),
        sessions=len(sessions),
        model=engine.part_or_empty("model").flat(),
        hardware=engine.part_or_empty("hardware").flat(),
        software={
            **engine.part_or_empty("software").flat(),
            **manifest.part_or_empty("versions").flat(),
        },
        provenance={
            "created": manifest.maybe("created", manifest.text) or NOT_RECORDED,
            "command": manifest.maybe("command", manifest.text) or NOT_RECORDED,
            **{f"seed of {key}": value for key, value in manifest.part_or_empty("seeds").flat().items()},
            **_process(engine),
        },
        excerpt=_excerpt(manifest.path.with_name("trace.json")),
        stored=engine.part_or_empty("stored").flat(),
        predicted=predicted.numbers(),
        measured=engine.numbers(),
    )


def _total(parts: Sequence[Document], key: str) -> float | None:
    """Sum over sessions, of those that recorded it."""
    found = [value for part in parts if (value := part.maybe(key, part.number)) is not None]
    return sum(found) if found else None


def _count(parts: Sequence[Document], key: str) -> int | None:
    found = [value for part in parts if (value := part.maybe(key, part.count)) is not None]
    return sum(found) if found else None


def _process(engine: Document) -> dict[str, str]:
    """The peak of the process up to the end of this policy, everything in it included."""
    if "process" not in engine.content:
        return {}
    process = engine.part("process")
    peak = process.maybe("peak_rss", process.count)
    return {"peak memory of the process": format_bytes(peak)} if peak else {}


def _placement(part: Document) -> dict[str, dict[str, float]]:
    kinds = TENSOR_KINDS if part.content else ()
    return {kind: {tier.value: part.part(kind).number(tier.value) for tier in Tier} for kind in kinds}


def _tier_use(tier: Tier, sessions: Sequence[Document]) -> TierUse:
    memory = [session.part_or_empty("memory").part_or_empty(tier.value) for session in sessions]

    def most(key: str) -> int | None:
        return max((n for m in memory if (n := m.maybe(key, m.count)) is not None), default=None)

    return TierUse(
        tier.value, memory[0].maybe("budget", memory[0].count), planned=most("planned"), peak=most("peak")
    )


def _streams(sessions: Sequence[Document], seconds: float | None) -> tuple[StreamUse, ...]:
    parts = [session.part_or_empty("streams") for session in sessions]
    used = []
    for name in dict.fromkeys(str(stream) for part in parts for stream in part.content):
        streams = [part.part(name) for part in parts if name in part.content]
        busy = sum(stream.number("busy_seconds") for stream in streams)
        used.append(
            StreamUse(
                name,
                busy,
                busy / seconds if seconds else 0.0,
                _count(streams, "bytes") or 0,
                _total(streams, "bound_seconds"),
            )
        )
    return tuple(used)


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
                Span(event.text("cat"), event.text("name"), begin, begin + event.number("dur") / 1e6)
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
        Span(s.stream, s.name, max(s.begin, begin) - begin, min(s.end, end) - begin)
        for s in inside
        if s.begin < end
    )
    return Excerpt(shown, end - begin, len(starts), whole)
