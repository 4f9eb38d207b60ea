"""Puts a suite's tables and pictures in the order of a report, with the words between them.

It knows what a reader needs to know to interpret the figures; it does not know Markdown or HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.units import format_bytes, format_seconds
from harness.report import verdicts as report_verdicts
from harness.report.analysis import published as report_published
from harness.report.analysis.findings import Findings
from harness.report.content import (
    MISSING,
    Cell,
    Content,
    Figure,
    Name,
    Number,
    Section,
    Table,
    fraction,
    per_second,
    ratio,
    with_interval,
)
from harness.report.evidence import Evidence
from harness.report.inputs.data import NOT_RECORDED, PolicyResult, Result
from harness.report.plots import suite as plots
from harness.report.tables import (
    SAVINGS,
    STREAM_WORDS,
    accuracy_table,
    entry_throughput_table,
    facts_table,
    matrix_table,
    memory_table,
    placement_table,
    saving,
    stream_table,
    throughput_table,
    used_table,
)


def make_content(suite: Findings, evidence: Evidence) -> Content:
    """Everything that the report of a suite says."""
    return Content(
        title=f"Suite {suite.suite}",
        lead=_lead(suite),
        facts=_facts(suite),
        warnings=_warnings(suite),
        sections=(
            report_verdicts.summary(suite, evidence.paired, len(suite.compared)),
            _accuracy(suite),
            *report_verdicts.differences(suite, evidence.paired),
            *report_verdicts.against_bits(evidence.bits),
            *report_verdicts.frontier(suite, evidence.standings),
            _throughput(suite),
            *report_verdicts.against_systems(evidence.systems),
            *report_published.section(evidence.published),
            _streams(suite),
            *_savings(suite),
            _memory(suite),
            *_predicted(suite),
            *report_verdicts.cases(suite, evidence.disagreements),
            Section("Placement", (_PLACEMENT,), tables=(placement_table(suite),)),
            Section(
                "Policies",
                (_POLICIES,),
                tables=(facts_table("Definitions", suite.policies, lambda p: p.definition),),
            ),
            _origin(suite),
        ),
    )


def make_content_without_suite(names: Sequence[str], evidence: Evidence) -> Content:
    """A report of curves and comparisons alone."""
    sections = (
        *report_verdicts.against_systems(evidence.systems),
        *report_verdicts.against_bits(evidence.bits),
        *report_published.section(evidence.published),
    )
    lead = "Compression formats, or systems, measured side by side."
    return Content(", ".join(names), lead, (), (), sections)


def _lead(suite: Findings) -> str:
    """What was run on what, in one line."""
    policies, entries = len(suite.policies), len(suite.run_entries)
    instances = sum(
        max((r.instances for r in suite.results if r.run_entry == e), default=0) for e in suite.run_entries
    )
    return (
        f"{policies} {'policy' if policies == 1 else 'policies'} on {entries} run "
        f"{'entry' if entries == 1 else 'entries'}, {instances:,} instances under each policy; "
        f"figures are {suite.kinds}."
    )


_PLACEMENT = (
    "Tensors and sequences are placed whole, so the achieved placement differs from the requested one. "
    "Figures in this report belong to the achieved placement. On a machine without an accelerator, device "
    "and host are the same memory."
)
_BOUND = (
    "The physical bound of a stream is the time that its work takes at the machine's measured rates; "
    "achieved / bound is 1 where nothing is lost."
)
_NO_BOUND = (
    "The physical bounds of the streams were not recorded with this suite: run_helm.py profile must have "
    "measured the machine before."
)
_POLICIES = "As in a policy file. 16 bits means: in the precision of the checkpoint, not compressed."


def _fact(facts: Mapping[str, str], key: str) -> str:
    """A fact, or that it was not recorded."""
    return facts.get(key, NOT_RECORDED)


def _facts(suite: Findings) -> tuple[tuple[str, Name | str], ...]:
    first = suite.policies[0]
    models = dict.fromkeys(_fact(p.model, "path") for p in suite.policies)
    parameters = first.model.get("num_parameters", "")
    size = f"{int(parameters):,} parameters, " if parameters.isdigit() else ""
    return (
        ("model", Name(", ".join(models))),
        ("kind", f"{size}{_fact(first.model, 'architecture')}, {_fact(first.model, 'weights')} weights"),
        ("digest", Name(_fact(first.model, "digest"))),
        ("machine", f"{_fact(first.hardware, 'cpu')}, {_fact(first.hardware, 'cores')} cores"),
        ("device", _fact(first.hardware, "device")),
        ("created", max(p.provenance["created"] for p in suite.policies)),
    )


def _warnings(suite: Findings) -> tuple[str, ...]:
    found = []
    if any(p.model.get("weights", "trained") != "trained" for p in suite.policies):
        found.append("The weights are random: accuracies here say nothing, only times and bytes do.")
    if suite.kinds != "measured":
        found.append(f"Not everything here is known to be measured; the figures are {suite.kinds}.")
    if len({p.model.get("digest") for p in suite.policies}) > 1:
        found.append(
            "The policies did not run the same model (see the digests below): do not compare their accuracy."
        )
    if len({tuple(sorted(p.hardware.items())) for p in suite.policies}) > 1:
        found.append("The policies did not run on the same machine: do not compare their throughput.")
    for policy in suite.policies:
        if policy.requests == 0:
            found.append(
                f"The engine's account of policy {policy.name} was lost when its process was killed: its "
                "accuracies and throughput per run entry are valid, figures of the whole suite are missing."
            )
        if policy.sessions > 1:
            found.append(
                f"Policy {policy.name} was run in {policy.sessions} parts; its figures are sums over the "
                "recorded ones. A part that was killed counts for the accuracies, but not for times and "
                "bytes."
            )
    return tuple(found)


def _accuracy(suite: Findings) -> Section:
    text = (
        "Each run entry's main metric with its 95 % interval: Wilson's where every answer is right or wrong, "
        "otherwise a bootstrap over instances; that of the mean takes the run entries as independent. "
        "All policies answer the same instances, so a difference between two policies is more certain than "
        "their intervals suggest."
    )
    last = ("mean", *(with_interval(suite.means.get(policy.name))[0] for policy in suite.policies))
    table = matrix_table(f"Main metric ({suite.kinds})", suite, _score, [last])
    shown = [r for r in suite.results if r.is_accuracy]
    if not shown:
        return Section("Accuracy", (text,), tables=(table,), more=(accuracy_table(suite),))
    figure = Figure(
        "accuracy.svg",
        f"Accuracy of {len(suite.policies)} policies on {len(suite.run_entries)} run entries, 95 % intervals",
        f"Accuracy per run entry and policy ({suite.kinds}).",
        accuracy_table(suite),
        lambda: plots.accuracy(suite),
    )
    others = len(suite.results) - len(shown)
    note = (f"{others} results are not accuracies between 0 and 1 and are in the tables only.",)
    return Section("Accuracy", (text, *(note if others else ())), figures=(figure,), tables=(table,))


def _score(result: Result) -> Cell:
    value = fraction(result.value)
    return (
        value
        if result.is_accuracy or result.value is None
        else Number(f"{value} ({result.metric})", result.value)
    )


def _throughput(suite: Findings) -> Section:
    text = (
        "Generated throughput is generated tokens over the time of all passes: prefill, decoding and scoring "
        "together, loading apart. Total throughput also counts prompt tokens. Requests that only score a "
        "prompt take time but generate nothing. A run entry's time is the sum of its requests' shares in the "
        "passes they took part in; run entries share passes, and equal requests count once."
    )
    figure = Figure(
        "throughput.svg",
        f"Generated and total tokens per second of {len(suite.policies)} policies",
        f"Throughput per policy over the whole suite ({suite.kinds}).",
        throughput_table(suite),
        lambda: plots.throughput(suite),
    )
    title = f"Total token/s per run entry ({suite.kinds})"
    table = matrix_table(title, suite, lambda result: per_second(result.total_per_second))
    return Section("Throughput", (text,), (figure,), (table,), more=(entry_throughput_table(suite),))


def _streams(suite: Findings) -> Section:
    meaning = "; ".join(f"{stream}: {words}" for stream, words in STREAM_WORDS.items())
    text = [
        f"A stream carries one kind of work ({meaning}). Streams work at the same time, so their "
        "shares may sum to more than 1; a stream near 1 is the bottleneck."
    ]
    figures = []
    if any(p.streams for p in suite.policies):
        figures.append(Figure(
            "streams.svg",
            f"Busy share of every stream under {len(suite.policies)} policies",
            f"Busy share per stream ({suite.kinds}).",
            stream_table(suite),
            lambda: plots.streams(suite),
        ))  # fmt: skip
    bounded = any(stream.bound_seconds is not None for p in suite.policies for stream in p.streams.values())
    text.append(_BOUND if bounded else _NO_BOUND)
    names = suite.names
    traced = [p for p in suite.policies if p.excerpt is not None]
    if traced:
        rows = tuple(
            (
                names[p.name], f"{p.excerpt.seconds * 1e3:,.2f}",
                "yes" if p.excerpt.whole else "beginning only",
                f"{len(p.excerpt.spans)}", f"{p.excerpt.passes:,}",
            )
            for p in traced if p.excerpt is not None
        )  # fmt: skip
        columns = ("policy", "milliseconds shown", "whole pass", "steps shown", "passes in the trace")
        figures.append(
            Figure(
                "timeline.svg",
                f"Which stream worked when in one pass of {len(traced)} policies",
                f"One pass each, of median length ({suite.kinds}). The whole trace.json opens in Perfetto.",
                Table(f"Excerpts of the traces ({suite.kinds})", columns, rows),
                lambda: plots.timeline(suite),
            )
        )
    missing = [p.name for p in suite.policies if p.excerpt is None]
    if missing:
        text.append(f"No trace with a whole pass was stored for: {', '.join(missing)}.")
    return Section("Where the time went", tuple(text), tuple(figures))


def _savings(suite: Findings) -> tuple[Section, ...]:
    """What shared prefixes and continuous batching saved, where it was recorded."""
    names = suite.names
    found = [
        (names[p.name], {key: p.measured.get(f"savings.{key}") for key in SAVINGS}) for p in suite.policies
    ]
    rows = [(name, values) for name, values in found if values["computed_tokens"] is not None]
    if not rows:
        return ()
    text = (
        "Prompt tokens that requests share are computed once, finished sequences leave the block, and "
        "waiting requests take their slots. Needed tokens are those of all prompts, each shared prefix "
        "counted once, and the generated ones; computed / needed tokens is 1 where nothing else was "
        "computed. Figures are those of the last session, without the answers kept from an earlier one."
    )
    table = Table(
        f"Prompt and computed tokens ({suite.kinds})",
        ("policy", *SAVINGS.values()),
        tuple((name, *(saving(key, value) for key, value in values.items())) for name, values in rows),
    )
    return (Section("What was computed once", (text,), tables=(table,)),)


def _memory(suite: Findings) -> Section:
    text = (
        "Bytes in each tier: planned before anything was loaded, and the peak that the engine allocated. It "
        "refuses what would exceed a budget. Memory of Python, torch and HELM is not in these figures; the "
        "peak of the whole process is in the last table of this report. Without a budget the limit is what "
        "the machine had free."
    )
    figure = Figure(
        "memory.svg",
        f"Planned and used bytes per tier of {len(suite.policies)} policies, with their budgets",
        f"Memory per tier: planned, peak used, budget ({suite.kinds}).",
        memory_table(suite),
        lambda: plots.memory(suite),
    )
    return Section("Memory", (text,), (figure,), (used_table(suite),))


def _predicted(suite: Findings) -> tuple[Section, ...]:
    """What the planner predicted beside what was measured, figure by figure."""
    rows: list[tuple[Cell, ...]] = []
    names = suite.names
    for policy in suite.policies:
        for key, expected in policy.predicted.items():
            key = key.removeprefix("predicted.")
            if key.startswith("policy."):
                continue
            found = _measured(policy, key)
            rows.append((
                names[policy.name], key.replace("_", " ").replace(".", ", "), figure(key, expected),
                MISSING if found is None else figure(key, found), ratio(found, expected),
            ))  # fmt: skip
    if not rows:
        return ()
    text = (
        "What the planner predicted from the measured rates of this machine, and what was measured. A "
        "ratio of 1.00 is an exact prediction. Predictions are simulated figures."
    )
    columns = ("policy", "figure", "predicted", "measured", "measured / predicted")
    table = Table("Predicted against measured", columns, tuple(rows), names=2)
    return (Section("Predicted against measured", (text,), tables=(table,)),)


def _measured(policy: PolicyResult, key: str) -> float | None:
    """The measured figure of a prediction's name."""
    if key == "generation_throughput":
        return policy.generated_per_second
    if key in ("generated_per_second", "total_per_second", "seconds", "passes", "generated_tokens"):
        known: float | None = getattr(policy, key)
        return known
    return policy.measured.get(key, policy.measured.get(f"{key}.busy_seconds"))


def figure(key: str, value: float) -> Number:
    """A figure in the unit that its name ends with."""
    if key.endswith(("bytes", "peak", "planned", "limit")):
        return Number(format_bytes(value), value)
    if (key.endswith(("seconds", "_s")) and not key.endswith("per_s")) or key.startswith(
        ("streams.", "busy.")
    ):
        return Number(format_seconds(value), value)
    return Number(f"{value:,.4g}", value)


def _origin(suite: Findings) -> Section:
    policies = suite.policies
    return Section(
        "Where this comes from",
        tables=(
            facts_table("Model", policies, lambda p: p.model),
            facts_table("Machine", policies, lambda p: p.hardware),
            facts_table("Software", policies, lambda p: p.software),
            facts_table("Run", policies, lambda p: p.provenance),
        ),
    )
