"""A hardware profile as it is printed: what a person wants to know of a machine, not every point of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from engine.spec.profile import HardwareProfile
from engine.spec.rates import RateTable
from engine.units import format_bytes, format_rate
from harness.text_table import markdown_table


def to_text(profile: HardwareProfile) -> str:
    """Several tables, each Markdown of aligned columns."""
    spreads = profile.notes.get("spreads")
    parts = [
        _machine(profile),
        _links(profile),
        _products(profile),
        _attention(profile),
        _overheads(profile),
        _slowdown(profile),
        _spreads(spreads) if isinstance(spreads, Mapping) and spreads else [],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _machine(profile: HardwareProfile) -> list[str]:
    rows = [("tier", "holds", "reads its memory at")]
    for tier, size in profile.capacity.items():
        rate = profile.memory_bandwidth.get(tier)
        rows.append((tier.value, format_bytes(size), f"{format_bytes(rate)}/s" if rate else "-"))
    known = ", ".join(f"{key} {value}" for key, value in profile.machine.items())
    return [f"{profile.name} ({profile.kind}): {known}", "", *markdown_table(rows, left=1)]


def _links(profile: HardwareProfile) -> list[str]:
    if not profile.links:
        return []
    sizes = profile.links[0].bandwidth.xs
    rows: list[Sequence[str]] = [
        ("bytes per second by transfer", "latency", *(format_bytes(x) for x in sizes))
    ]
    for link in profile.links:
        name = f"{link.source} to {link.target}" + ("" if link.pinned else ", not pinned")
        rates = (f"{format_bytes(link.bandwidth.at(x))}" for x in sizes)
        rows.append((name, f"{link.latency * 1e6:.0f} us", *rates))
    return markdown_table(rows, left=1)


def _products(profile: HardwareProfile) -> list[str]:
    table = next(iter(profile.products.values()))
    rows: list[Sequence[str]] = [("GFLOP/s of products by rows", *(f"{x:.0f}" for x in table.xs))]
    for form, rates in profile.products.items():
        rows.append((f"{form}, {rates.ys[-1]:,.0f} values", *_giga(rates, rates.ys[-1], table.xs)))
    return markdown_table(rows, left=1)


def _attention(profile: HardwareProfile) -> list[str]:
    prompt = profile.attention.prompt
    lines = markdown_table(
        [("GFLOP/s of attention by tokens", *(f"{x:.0f}" for x in prompt.xs)),
         ("one prompt", *_giga(prompt, 1, prompt.xs))], left=1,
    )  # fmt: skip
    tables = [(key, table) for key, table in profile.attention.decode.items()]
    tables += [(f"{key} on the host", table) for key, table in profile.attention.decode_host.items()]
    xs = tables[0][1].xs
    rows: list[Sequence[str]] = [("GFLOP/s of decoding by context", *(f"{x:.0f}" for x in xs))]
    rows += [
        (f"KV {key}, {table.ys[-1]:.0f} sequences", *_giga(table, table.ys[-1], xs)) for key, table in tables
    ]
    return [*lines, "", *markdown_table(rows, left=1)]


def _overheads(profile: HardwareProfile) -> list[str]:
    rows = [("overhead", "microseconds")]
    rows += [
        (key.replace("_", " "), f"{value * 1e6:.1f}") for key, value in asdict(profile.overheads).items()
    ]
    elementwise = profile.elementwise
    rate = elementwise.at(elementwise.xs[-1], elementwise.ys[-1])
    others = [f"{format_rate(rate, 'hidden value')} through the rest of a layer"]
    others.append(f"{format_rate(profile.logits.at(profile.logits.xs[-1]), 'logit')} chosen from")
    others += [
        f"{format_rate(t.at(t.xs[-1]), 'value')} of {form} unpacked" for form, t in profile.unpack.items()
    ]
    return [*markdown_table(rows, left=1), "", *others]


def _slowdown(profile: HardwareProfile) -> list[str]:
    return [
        f"{work} takes {factor:.2f} times as long beside {other}"
        for work, others in profile.slowdown.items()
        for other, factor in others.items()
    ]


def _spreads(spreads: Mapping[str, float]) -> list[str]:
    widest = sorted(spreads.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {value:.0%}" for name, value in widest)
    return [f"repetitions: the middle half lies furthest apart in {named} of the median"]


def _giga(table: RateTable, y: float, xs: Sequence[float]) -> list[str]:
    """GFLOP/s; a dash for fewer rows than were measured."""
    rates = [table.at(x, y) / 1e9 for x in xs]
    shown = [f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in rates]
    return ["-" if x < table.xs[0] else text for x, text in zip(xs, shown, strict=True)]
