"""The sections that compare: policies by paired tests, bits, speed and single requests; other systems.

It knows what a reader needs to know to interpret the figures; it does not know Markdown or HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from harness.report.analysis.bits import Bits, bits_table, entries_table
from harness.report.analysis.findings import Findings
from harness.report.analysis.frontier import Standing, frontier_table
from harness.report.analysis.pairs import ALL, Disagreement, Disagreements, Paired
from harness.report.analysis.systems import ENTRY_PREFIX, Systems, number_of, text_of
from harness.report.content import (
    MISSING,
    Card,
    Case,
    CaseGroup,
    Cell,
    Figure,
    Name,
    Number,
    Reply,
    Section,
    Table,
    count,
    fraction,
    interval,
    per_second,
    probability,
    ratio,
    signed,
    signed_interval,
    size,
)
from harness.report.plots import bits as plots_bits
from harness.report.plots import points as plots_points
from harness.report.tables import summary_table

_MOST_CARDS = 8


def summary(suite: Findings, paired: Sequence[Paired], entries: int) -> Section:
    """One card per policy, and the table."""
    first, total = suite.policies[0].name, len(suite.run_entries)
    rest = "" if entries == total else "; the others have no accuracy"
    text = (
        f"Change and speed (of total token/s) are relative to the first policy, {first}. Mean accuracy is "
        f"over {entries} of {total} run entries, with equal weight{rest}."
    )
    cards = _cards(suite, paired) if len(suite.policies) <= _MOST_CARDS else ()
    return Section("Summary", (text,), tables=(summary_table(suite),), cards=cards)


def _cards(suite: Findings, paired: Sequence[Paired]) -> tuple[Card, ...]:
    names, first = suite.names, suite.policies[0]
    against = {p.right: p for p in paired if p.entry == ALL and p.left == first.name}
    cards = []
    for policy in suite.policies:
        mean = suite.means.get(policy.name)
        facts = []
        if mean:
            low_high = interval(mean.low, mean.high)
            facts.append(("mean accuracy", f"{mean.value:.3f}", "" if low_high == MISSING else low_high))
        if policy is first and against:
            facts.append(("reference", "–", "the others are compared with it"))
        elif policy.name in against:
            facts.append(("against " + first.name, *_change(against[policy.name])))
        rate = policy.total_per_second
        speed = ratio(rate, first.total_per_second)
        remark = f"{speed} of {first.name}" if policy is not first and speed != MISSING else ""
        facts.append(("total throughput", _throughput(rate), remark))
        peaks = [f"{name} {size(tier.peak)}" for name, tier in policy.tiers.items() if tier.peak]
        if peaks:
            facts.append(("peak memory", peaks[0], ", ".join(peaks[1:])))
        cards.append(Card(names[policy.name], tuple(facts)))
    return tuple(cards)


def _throughput(rate: float | None) -> str:
    if rate is None:
        return "not recorded"
    return f"{rate:,.0f} token/s" if rate >= 100 else f"{rate:.3g} token/s"


def _change(paired: Paired) -> tuple[str, str]:
    change = paired.change
    verdict = (
        f"significant, p {_p(paired.corrected)}"
        if paired.significant
        else f"not significant; minimum detectable effect {change.detectable:.3f}"
    )
    return signed(change.value), verdict


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def differences(suite: Findings, paired: Sequence[Paired]) -> tuple[Section, ...]:
    """Paired comparisons, where instances were stored."""
    if not paired:
        return ()
    first = suite.policies[0].name
    text = (
        "All policies answer the same instances, so they are compared instance by instance. Where answers "
        "are right or wrong: McNemar's exact test and the interval of Bonett and Price; otherwise a paired "
        "bootstrap. p is corrected for the number of comparisons in the table (Holm). A filled marker is a "
        "significant difference; the pale band is the minimum detectable effect, at a power of 80 %: an "
        "interval inside it says little about differences smaller than the band."
    )
    drawn = [p for p in paired if p.left == first and p.entry == ALL]
    drawn += [p for p in paired if p.left == first and p.entry != ALL and _unit(suite, p)]
    overall, single = [p for p in paired if p.entry == ALL], [p for p in paired if p.entry != ALL]
    title = f"Pairs of policies, all instances together ({suite.kinds})"
    full = _paired_table(title, suite, overall, False)
    entries = _paired_table(f"Against {first}, per run entry ({suite.kinds})", suite, single, True)
    short = (full.part(f"All instances together ({suite.kinds})", 0, 1, 6, 2, 10),) if overall else ()
    folded = tuple(table for table in (full, entries) if table.rows)
    name = "Is the difference real?"
    if not drawn:
        return (Section(name, (text,), tables=short, more=folded),)
    figure = Figure(
        "differences.svg",
        f"Differences of accuracy against {first} with 95 % intervals",
        f"Difference of accuracy against {first}, 95 % interval ({suite.kinds}).",
        entries if single else full,
        lambda: plots_points.differences(suite, drawn),
    )
    return (Section(name, (text,), (figure,), short, (full,) if overall else ()),)


def _unit(suite: Findings, paired: Paired) -> bool:
    result = suite.result(paired.entry, paired.right)
    return result is not None and result.is_accuracy


def _paired_table(title: str, suite: Findings, found: Sequence[Paired], entries: bool) -> Table:
    names = suite.names
    rows: list[tuple[Cell, ...]] = []
    for paired in found:
        change = paired.change
        rows.append((
            *((Name(paired.entry),) if entries else ()), names[paired.left], names[paired.right],
            "significant" if paired.significant else "not significant",
            count(paired.instances),
            MISSING if paired.only_left is None else count(paired.only_left),
            MISSING if paired.only_right is None else count(paired.only_right),
            signed(change.value), signed_interval(change.low, change.high),
            probability(change.p), probability(paired.corrected),
            fraction(change.detectable),
        ))  # fmt: skip
    columns = (
        *(("run entry",) if entries else ()), "policy", "compared with it", "difference", "instances",
        "only first right", "only second right", "second − first", "95 % interval", "p", "p, corrected",
        "minimum detectable effect",
    )  # fmt: skip
    return Table(title, columns, tuple(rows), names=4 if entries else 3)


def against_bits(found: Sequence[Bits]) -> tuple[Section, ...]:
    """Accuracy against bits and what accuracy alone hides."""
    if not found:
        return ()
    text = (
        "Every format against full precision (line; band: its 95 % interval). Dashed: 99 % and 99.9 % of its "
        "accuracy, the two targets of MLPerf. Bits are as stored, scales included. Accuracy on few instances "
        "hides damage that likelihood, divergence from full precision's distributions and agreement on the "
        "most probable token show."
    )
    figures: list[Figure] = []
    more: list[Table] = []
    for index, bits in enumerate(found):
        drawn = [] if index and len(bits.points) < 3 else _bits_figures(bits, f"-{index}" if index else "")
        figures += drawn
        if not any(figure.file.startswith("bits-accuracy") for figure in drawn):
            more.append(bits_table(bits))
    return (Section("Accuracy against bits", (text,), tuple(figures), more=tuple(more)),)


def _bits_figures(bits: Bits, suffix: str) -> list[Figure]:
    """What was measured of accuracy, of single run entries and of distances."""
    figures = []

    def add(name: str, draw: Callable[[Bits, str], str], data: Table, alt: str, caption: str) -> None:
        caption = f"{caption}: {bits.source} ({bits.kind})."
        drawn = partial(draw, bits, f"{name}{suffix}")
        figures.append(Figure(f"{name}{suffix}.svg", f"{alt}, {bits.source}", caption, data, drawn))

    if plots_bits.has_accuracy(bits):
        alt = f"Mean accuracy of {len(bits.points)} formats against bits per value"
        instances = f", {bits.instances}" if bits.instances else ""
        caption = f"Mean accuracy against bits{instances}"
        add("bits-accuracy", plots_bits.accuracy, bits_table(bits), alt, caption)
        if bits.entries and len(bits.points) > 2:
            alt = f"Accuracy against bits for {len(bits.entries)} run entries"
            add("bits-entries", plots_bits.entries, entries_table(bits), alt, "The same per run entry")
    if plots_bits.has_distances(bits):
        alt = "Likelihood, divergence and agreement against bits"
        caption = "Likelihood, mean KL divergence and top-token agreement"
        add("bits-distances", plots_bits.distances, bits_table(bits), alt, caption)
    return figures


def frontier(suite: Findings, found: Sequence[Standing]) -> tuple[Section, ...]:
    """Speed against accuracy, latency against throughput."""
    shown = [s for s in found if s.rate and s.accuracy]
    slow = [s for s in found if s.rate and s.latency is not None]
    if not shown and not slow:
        return ()
    text = (
        "A policy is dominated, and grey, if another is at least as fast and as accurate and better in one "
        "of the two; the line joins the others. Differences of accuracy that are not significant still "
        "count here: see the paired comparisons. Latency is the wall time of the passes that a request "
        "took part in, without waiting for a slot in the block."
    )
    table = frontier_table(suite, found)
    kinds = (
        ("frontier", shown, plots_points.frontier, "Throughput and mean accuracy",
         "Throughput against accuracy"),
        ("latency", slow, plots_points.latency, "Latency and throughput",
         "Latency of a request against throughput"),
    )  # fmt: skip
    figures = [
        Figure(
            f"{name}.svg", f"{alt} of {len(points)} policies", f"{caption} ({suite.kinds}).", table,
            partial(draw, suite, found),
        )
        for name, points, draw, alt, caption in kinds
        if points
    ]  # fmt: skip
    return (Section("Speed against accuracy", (text,), tuple(figures)),)


def cases(suite: Findings, found: Sequence[Disagreements]) -> tuple[Section, ...]:
    """Requests that two policies answered differently."""
    if not found:
        return ()
    names, groups = suite.names, []
    for pair in found:
        title = f"{pair.left} and {pair.right}: {pair.differing:,} of {pair.compared:,} answers differ"
        left_out = pair.differing - len(pair.shown)
        note = "All of them are shown." if pair.shown else "There are none."
        if left_out:
            note = f"{len(pair.shown):,} are shown, {left_out:,} are left out."
        groups.append(CaseGroup(title, note, tuple(_case(d, pair, names) for d in pair.shown)))
    text = (
        "Requests that two policies answered differently, side by side; those whose scores differ come "
        "first. All others are in HELM's own files (scenario_state.json)."
    )
    return (Section("Disagreements", (text,), groups=tuple(groups)),)


def _case(item: Disagreement, pair: Disagreements, names: Mapping[str, Name]) -> Case:
    def reply(policy: str, text: str, value: float | None) -> Reply:
        right = None if value not in (0.0, 1.0) else value == 1.0
        return Reply(names[policy], text, right, str(fraction(value)))

    trial = f", trial {item.left.trial}" if item.left.trial else ""
    return Case(
        f"{item.entry}, {item.left.instance}{trial}",
        item.left.question,
        item.left.prompt,
        item.left.correct,
        reply(pair.left, item.left.answer, item.left_value),
        reply(pair.right, item.right.answer, item.right_value),
    )


def against_systems(found: Sequence[Systems]) -> tuple[Section, ...]:
    """Pictures and tables of every comparison."""
    if not found:
        return ()
    text = (
        "The same requests, weights and memory cap through every system, each in a process of its own on one "
        "machine. Ratios are ours over theirs of generated token/s at equal bits: the median over repeats, "
        "with the smallest and the largest. What failed or could not run is in the table with its reason; "
        "published figures are labelled and enter no ratio."
    )
    figures, tables = [], []
    for index, one in enumerate(found):
        suffix = f"-{index}" if index else ""
        if one.ratios:
            figures.append(
                Figure(
                    f"ratios{suffix}.svg",
                    f"How many times faster ours is than {len(one.ratios)} systems",
                    f"Generated token/s, ours over theirs: comparison {one.name} (measured).",
                    _ratio_table(one),
                    partial(plots_points.ratios, one, suffix),
                )
            )
        tables.append(_system_table(one))
        if one.entries:
            tables.append(_entry_table(one))
    return (Section("Ours against other offloaders", (text,), tuple(figures), tuple(tables)),)


def _ratio_table(one: Systems) -> Table:
    rows = tuple(
        (
            a.setting, Name(a.theirs.name), Name(a.mine.name), a.mine.bits,
            Number(f"{a.ratio.median:.2f}×", a.ratio.median),
            Number(f"{a.ratio.least:.2f} to {a.ratio.most:.2f}", a.ratio.least), count(a.ratio.count),
        )
        for a in one.ratios
    )  # fmt: skip
    columns = ("setting", "system", "ours", "bits", "ours / theirs", "spread", "repeats")
    return Table(f"Ratios of generated token/s, comparison {one.name} (measured)", columns, rows, names=3)


def _system_table(one: Systems) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for s in one.systems:
        rates, best = list(s.rates.values()), s.best
        spread = Number(f"{min(rates):,.2f} to {max(rates):,.2f}", min(rates)) if len(rates) > 1 else MISSING
        peak, cap = number_of(best.get("peak_bytes")), number_of(best.get("memory_cap_bytes"))
        rows.append((
            s.setting, Name(s.name), s.outcome if len(s.outcome) < 160 else f"{s.outcome[:160]}…",
            s.kind, s.bits or MISSING, _whole(best.get("batch")),
            per_second(median(rates)) if rates else MISSING, spread,
            per_second(number_of(best.get("total_tokens_per_s"))),
            size(peak) if peak else MISSING, size(cap) if cap else "none",
            fraction(number_of(best.get("agreement"))), fraction(number_of(best.get("logit_distance"))),
            fraction(number_of(best.get("accuracy"))), text_of(best.get("cap_enforced")) or MISSING,
        ))  # fmt: skip
    columns = (
        "setting", "system", "outcome", "kind", "bits", "batch", "generated token/s", "spread",
        "total token/s", "peak", "cap", "same tokens", "logit distance", "accuracy",
        "limit",
    )  # fmt: skip
    return Table(f"Systems, comparison {one.name}", columns, tuple(rows), names=4)


def _entry_table(one: Systems) -> Table:
    rows = tuple(
        (
            Name(text_of(row["workload"]).removeprefix(ENTRY_PREFIX).strip()), text_of(row["setting"]),
            Name(f"{row['system']} {text_of(row['configuration'])}".strip()),
            fraction(number_of(row.get("accuracy"))),
            "ok" if row["status"] == "ok" else f"{row['status']}: {text_of(row.get('reason'))}"[:160],
        )
        for row in one.entries
    )  # fmt: skip
    columns = ("run entry", "setting", "system", "accuracy", "outcome")
    return Table(f"Accuracy on run entries, comparison {one.name}", columns, rows, names=3)


def _whole(value: Any) -> Cell:
    number = number_of(value)
    return MISSING if number is None else count(int(number))
