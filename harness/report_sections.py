"""Puts a suite's tables and pictures in the order of a report, with the words between them.

It knows what a reader has to be told so as not to be misled; it does not know Markdown or HTML.
"""

from __future__ import annotations

from harness import plots
from harness.report_content import (
    LANE_WORDS,
    Content,
    Figure,
    Name,
    Section,
    Table,
    accuracy_table,
    compared_entries,
    entry_throughput_table,
    facts_table,
    kinds,
    lane_table,
    matrix_table,
    mean_accuracy,
    memory_table,
    per_second,
    placement_table,
    summary_table,
    throughput_table,
)
from harness.report_data import Result, SuiteResults


def make_content(suite: SuiteResults) -> Content:
    """Everything that the report of a suite says."""
    return Content(
        title=f"Suite {suite.suite}",
        facts=_facts(suite),
        warnings=_warnings(suite),
        sections=(
            _summary(suite),
            _accuracy(suite),
            _throughput(suite),
            _lanes(suite),
            _memory(suite),
            Section("Placement", (_PLACEMENT,), tables=(placement_table(suite),)),
            Section(
                "Policies",
                (_POLICIES,),
                tables=(facts_table("Definitions", suite.policies, lambda p: p.definition),),
            ),
            _origin(suite),
        ),
    )


_PLACEMENT = (
    "Whole tensors and whole sequences are indivisible, so what is achieved differs from what was asked. "
    "Figures in this report belong to the achieved placement. On a machine without an accelerator, device "
    "and host are the same memory."
)
_POLICIES = (
    "As they stand in a policy file. 16 bits means: kept in the precision of the checkpoint, not compressed."
)


def _facts(suite: SuiteResults) -> tuple[tuple[str, Name | str], ...]:
    first = suite.policies[0]
    models = dict.fromkeys(p.model.get("path", "?") for p in suite.policies)
    parameters = first.model.get("num_parameters", "")
    size = f"{int(parameters):,} parameters, " if parameters.isdigit() else ""
    return (
        ("model", Name(", ".join(models))),
        ("", f"{size}{first.model.get('architecture', '?')}, {first.model.get('weights', '?')} weights"),
        ("digest", Name(first.model.get("digest", "?"))),
        ("machine", f"{first.hardware.get('cpu', '?')}, {first.hardware.get('cores', '?')} cores"),
        ("device", first.hardware.get("device", "?")),
        ("figures", kinds(suite)),
        ("created", max(p.provenance["created"] for p in suite.policies)),
    )


def _warnings(suite: SuiteResults) -> tuple[str, ...]:
    found = []
    if any(p.model.get("weights") != "trained" for p in suite.policies):
        found.append(
            "The weights are not trained ones: accuracies here say nothing, only times and bytes do."
        )
    if kinds(suite) != "measured":
        found.append(f"Not everything here was measured; the figures are {kinds(suite)}.")
    if len({p.model.get("digest") for p in suite.policies}) > 1:
        found.append(
            "The policies did not run the same model (see the digests below): do not compare their accuracy."
        )
    if len({tuple(sorted(p.hardware.items())) for p in suite.policies}) > 1:
        found.append("The policies did not run on the same machine: do not compare their throughput.")
    for policy in suite.policies:
        if not policy.requests:
            found.append(
                f"The engine's account of policy {policy.name} was lost when its process was killed: its "
                "accuracies and throughput per run entry stand, figures of the whole suite are missing."
            )
        if policy.sessions > 1:
            found.append(
                f"Policy {policy.name} was run in {policy.sessions} parts; its figures are sums over those "
                "that were recorded. A part that was killed is in the accuracies, but not in times and bytes."
            )
    return tuple(found)


def _summary(suite: SuiteResults) -> Section:
    count, total = len(compared_entries(suite)), len(suite.run_entries)
    text = [
        f"Change and speed (of total token/s) are against the first policy, {suite.policies[0].name}.",
        f"Mean accuracy: {count} of {total} run entries, equal weight"
        + ("." if count == total else "; the others have no accuracy under every policy."),
    ]
    return Section("In short", (" ".join(text),), tables=(summary_table(suite),))


def _accuracy(suite: SuiteResults) -> Section:
    text = (
        "Each run entry's main metric. The intervals are of 95 %: Wilson's where every answer is right or "
        "wrong, bootstrap over instances otherwise; that of the mean takes the run entries as independent. "
        "All policies answer the same instances, so a difference between two policies is more certain than "
        "their intervals suggest."
    )
    means = [mean_accuracy(suite, policy.name) for policy in suite.policies]
    last = ("mean", *("–" if mean is None else f"{mean.value:.3f}" for mean in means))
    table = matrix_table(f"Main metric ({kinds(suite)})", suite, _score, [last])
    shown = [r for r in suite.results if r.is_accuracy]
    if not shown:
        return Section("Accuracy", (text,), tables=(table,), more=(accuracy_table(suite),))
    figure = Figure(
        "accuracy.svg",
        f"Accuracy of {len(suite.policies)} policies on {len(suite.run_entries)} run entries, 95 % intervals",
        f"Accuracy per run entry and policy ({kinds(suite)}).",
        accuracy_table(suite),
        lambda: plots.accuracy(suite),
    )
    others = len(suite.results) - len(shown)
    note = (f"{others} results are no accuracies between 0 and 1 and stand in the tables only.",)
    return Section("Accuracy", (text, *(note if others else ())), figures=(figure,), tables=(table,))


def _score(result: Result) -> str:
    value = "–" if result.value is None else f"{result.value:.3f}"
    return value if result.is_accuracy else f"{value} ({result.metric})"


def _throughput(suite: SuiteResults) -> Section:
    text = (
        "Generated throughput is generated tokens over the time of all passes: prefill, decoding and scoring "
        "together, loading apart. Total throughput also counts prompt tokens. Requests that only score a "
        "prompt take time but generate nothing. A run entry's time is the sum of its requests' shares in the "
        "passes they took part in; run entries share passes, and equal requests count once."
    )
    figure = Figure(
        "throughput.svg",
        f"Generated and total tokens per second of {len(suite.policies)} policies",
        f"Throughput per policy over the whole suite ({kinds(suite)}).",
        throughput_table(suite),
        lambda: plots.throughput(suite),
    )
    title = f"Total token/s per run entry ({kinds(suite)})"
    table = matrix_table(title, suite, lambda result: per_second(result.total_per_second))
    return Section("Throughput", (text,), (figure,), (table,), more=(entry_throughput_table(suite),))


def _lanes(suite: SuiteResults) -> Section:
    meaning = "; ".join(f"{lane}: {words}" for lane, words in LANE_WORDS.items())
    text = [
        f"A lane carries one kind of work ({meaning}). Lanes work at the same time, so their shares may sum "
        "to more than 1; a lane near 1 is the one that all others wait for."
    ]
    figures = [
        Figure(
            "lanes.svg",
            f"Busy share of every lane under {len(suite.policies)} policies",
            f"Busy share per lane ({kinds(suite)}).",
            lane_table(suite),
            lambda: plots.lanes(suite),
        )
    ]
    traced = [p for p in suite.policies if p.excerpt is not None]
    if traced:
        rows = tuple(
            (
                Name(p.name), f"{p.excerpt.seconds * 1e3:,.2f}",
                "yes" if p.excerpt.whole else "beginning only",
                f"{len(p.excerpt.spans)}", f"{p.excerpt.passes:,}",
            )
            for p in traced if p.excerpt is not None
        )  # fmt: skip
        columns = ("policy", "milliseconds shown", "whole pass", "steps shown", "passes in the trace")
        figures.append(
            Figure(
                "timeline.svg",
                f"Which lane worked when in one pass of {len(traced)} policies",
                f"One pass each, of median length ({kinds(suite)}). The whole trace.json opens in Perfetto.",
                Table(f"Excerpts of the traces ({kinds(suite)})", columns, rows),
                lambda: plots.timeline(suite),
            )
        )
    missing = [p.name for p in suite.policies if p.excerpt is None]
    if missing:
        text.append(f"No trace with a whole pass was stored for: {', '.join(missing)}.")
    return Section("Where the time went", tuple(text), tuple(figures))


def _memory(suite: SuiteResults) -> Section:
    text = (
        "Bytes that the engine held in each tier: planned before anything was loaded, and the peak that the "
        "byte ledger saw. The ledger refuses what would exceed a budget; what Python, torch and HELM hold "
        "besides is not in these figures (the whole process's peak is in the last table of this report). No "
        "budget means: all that the machine had free."
    )
    figure = Figure(
        "memory.svg",
        f"Planned and used bytes per tier of {len(suite.policies)} policies, with their budgets",
        f"Memory per tier: planned, peak used, budget ({kinds(suite)}).",
        memory_table(suite),
        lambda: plots.memory(suite),
    )
    return Section("Memory", (text,), (figure,))


def _origin(suite: SuiteResults) -> Section:
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
