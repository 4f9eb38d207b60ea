"""Reads a suite's folder into the nouns of its report, and refuses what is damaged by file and field.

It knows table.json, the manifests and the traces; it does not know how any of it will be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UsageError
from engine.spec.hardware import Tier
from engine.units import format_bytes
from harness.report_file import Document
from harness.score import BITS_PER_BYTE

TENSOR_KINDS = ("weights", "kv", "activations")
_MOST_SPANS = 320


@dataclass(frozen=True)
class Result:
    """One run entry under one policy: a row of table.json."""

    run_entry: str
    policy: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    """The metric and its 95 % interval; None where it was not to be had."""

    interval: str
    instances: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    kind: str

    @property
    def is_accuracy(self) -> bool:
        """Whether it lies between 0 and 1 and more is better, so that it can be averaged with others."""
        return self.metric != BITS_PER_BYTE and self.value is not None and 0 <= self.value <= 1

    @property
    def total_per_second(self) -> float | None:
        """Prompt and generated tokens over the requests' shares of the passes they took part in."""
        return (self.prompt_tokens + self.generated_tokens) / self.seconds if self.seconds else None


@dataclass(frozen=True)
class LaneUse:
    """What one lane did, over all passes of a policy."""

    lane: str
    busy_seconds: float
    share: float
    """Busy seconds over the seconds of all passes; lanes overlap, so shares may sum to more than 1."""

    bytes: int


@dataclass(frozen=True)
class TierUse:
    """Bytes of one tier."""

    tier: str
    budget: int | None
    """None: no budget was set."""

    planned: int
    peak: int


@dataclass(frozen=True)
class Span:
    """One job on one lane; seconds since the excerpt begins."""

    lane: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Excerpt:
    """A stretch of a policy's trace: one pass, or its beginning where it has very many steps."""

    spans: tuple[Span, ...]
    seconds: float
    """Length of the stretch that is shown."""

    passes: int
    """Passes that the trace holds."""

    whole: bool
    """Whether the pass is shown to its end."""


@dataclass(frozen=True)
class PolicyRun:
    """All that is known of one policy's passes: its manifest and its trace."""

    name: str
    kind: str
    """measured, simulated or projected."""

    definition: Mapping[str, str]
    placement: Mapping[str, Mapping[str, float]]
    """Achieved fractions, by kind of tensor and tier; none if the recorded session answered nothing."""

    tiers: tuple[TierUse, ...]
    lanes: tuple[LaneUse, ...]
    requests: int
    passes: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    load_seconds: float
    sessions: int
    """Runs of the engine that the sums come from; more than one where a suite was continued."""

    model: Mapping[str, str]
    hardware: Mapping[str, str]
    software: Mapping[str, str]
    provenance: Mapping[str, str]
    """Command, time of creation, seeds, memory of the process."""

    excerpt: Excerpt | None
    """None where no trace was stored."""

    @property
    def generated_per_second(self) -> float | None:
        """Generated tokens over the seconds of all passes, loading not counted."""
        return self.generated_tokens / self.seconds if self.seconds and self.generated_tokens else None

    @property
    def total_per_second(self) -> float | None:
        """Prompt and generated tokens over the seconds of all passes."""
        return (self.prompt_tokens + self.generated_tokens) / self.seconds if self.seconds else None


@dataclass(frozen=True)
class SuiteResults:
    """One suite, its policies in the order of its table."""

    suite: str
    results: tuple[Result, ...]
    policies: tuple[PolicyRun, ...]

    @property
    def run_entries(self) -> list[str]:
        """In the order of the table."""
        return list(dict.fromkeys(result.run_entry for result in self.results))

    def result(self, run_entry: str, policy: str) -> Result | None:
        """The row of a run entry and a policy."""
        return next((r for r in self.results if (r.run_entry, r.policy) == (run_entry, policy)), None)


def read_suite(suite_dir: Path) -> SuiteResults:
    """Read a suite's table, and the manifest and trace of every policy in it.

    Raises:
        UsageError: if a file is missing or damaged; the message names the file and the field.
    """
    table = Document.read(suite_dir / "table.json")
    table.check_schema()
    results = tuple(_result(row) for row in table.parts("rows"))
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


def _result(row: Document) -> Result:
    return Result(
        run_entry=row.text("run_entry"),
        policy=row.text("policy"),
        metric=row.text("metric"),
        value=row.maybe("accuracy", row.number),
        low=row.maybe("low", row.number),
        high=row.maybe("high", row.number),
        interval=row.maybe("interval", row.text) or "none",
        instances=row.count("instances"),
        requests=row.count("requests"),
        prompt_tokens=row.count("prompt_tokens"),
        generated_tokens=row.count("generated_tokens"),
        seconds=row.number("seconds"),
        kind=row.kind(),
    )


def _policy_run(name: str, manifest: Document) -> PolicyRun:
    manifest.check_schema()
    engine = manifest.part("engine")
    sessions = [
        engine,
        *(manifest.parts("earlier_sessions") if "earlier_sessions" in manifest.content else []),
    ]
    totals = [session.part("totals") for session in sessions]
    return PolicyRun(
        name=name,
        kind=engine.kind(),
        definition=engine.part("policy").flat(),
        placement=_placement(engine.part("placement")),
        tiers=tuple(_tier_use(tier, sessions) for tier in Tier),
        lanes=_lanes(sessions, sum(t.number("seconds") for t in totals)),
        requests=sum(t.count("requests") for t in totals),
        passes=sum(t.count("passes") for t in totals),
        prompt_tokens=sum(t.count("prompt_tokens") for t in totals),
        generated_tokens=sum(t.count("generated_tokens") for t in totals),
        seconds=sum(t.number("seconds") for t in totals),
        load_seconds=sum(t.number("load_seconds") for t in totals),
        sessions=len(sessions),
        model=engine.part("model").flat(),
        hardware=engine.part("hardware").flat(),
        software={**engine.part("software").flat(), **manifest.part("versions").flat()},
        provenance={
            "created": manifest.text("created"),
            "command": manifest.text("command"),
            **{f"seed of {key}": value for key, value in manifest.part("seeds").flat().items()},
            **_process(engine),
        },
        excerpt=_excerpt(manifest.path.with_name("trace.json")),
    )


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
    memory = [session.part("memory").part(tier.value) for session in sessions]
    return TierUse(
        tier.value,
        budget=memory[0].maybe("budget", memory[0].count),
        planned=max(m.count("planned") for m in memory),
        peak=max(m.count("peak") for m in memory),
    )


def _lanes(sessions: Sequence[Document], seconds: float) -> tuple[LaneUse, ...]:
    names = dict.fromkeys(str(lane) for session in sessions for lane in session.part("lanes").content)
    used = []
    for name in names:
        lanes = [session.part("lanes").part(name) for session in sessions]
        busy = sum(lane.number("busy_seconds") for lane in lanes)
        used.append(
            LaneUse(
                name, busy, busy / seconds if seconds else 0.0, sum(lane.count("bytes") for lane in lanes)
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
    starts = [span.begin for span in spans if span.lane == "compute" and span.name.endswith(" 0.0")]
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
        Span(s.lane, s.name, max(s.begin, begin) - begin, min(s.end, end) - begin)
        for s in inside
        if s.begin < end
    )
    return Excerpt(shown, end - begin, len(starts), whole)
