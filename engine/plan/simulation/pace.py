"""A machine's profile at another pace than that at which it was measured.

Processors and disks that are shared with others, or throttled once a burst is over, change their speed from
minute to minute. A few measurements that are made again tell by how much; all rates of one kind go with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

from engine.spec.hardware import Tier
from engine.spec.profile import HardwareProfile
from engine.spec.rates import AttentionRates, Overheads, Pace, RateTable

FEW, MANY = 4, 512
"""Rows of the two products that a `Pace` knows: of short calls, between which threads wait for each other,
and of long ones."""


def at_pace(profile: HardwareProfile, now: Pace) -> HardwareProfile:
    """The profile as if it had been measured at another pace; itself where its own is not known.

    Rates of products go with the number of rows from one pace to the other, prompts' attention goes with
    many rows, and everything else that computes goes with few.
    """
    then = profile.pace
    if then is None:
        return profile
    few, many, read = now.few / then.few, now.many / then.many, now.read / then.read

    def by_rows(rows: float) -> float:
        part = min(max(math.log(rows / FEW) / math.log(MANY / FEW), 0.0), 1.0)
        return math.exp((1 - part) * math.log(few) + part * math.log(many))

    def scaled(tables: Mapping[str, RateTable]) -> dict[str, RateTable]:
        return {key: table.scaled(few) for key, table in tables.items()}

    attention = profile.attention
    seconds = {name: value / few for name, value in asdict(profile.overheads).items()}
    return replace(
        profile,
        memory_bandwidth={tier: rate * few for tier, rate in profile.memory_bandwidth.items()},
        links=tuple(
            replace(link, bandwidth=link.bandwidth.scaled(read), latency=link.latency / read)
            if Tier.DISK in (link.source, link.target) else link
            for link in profile.links
        ),
        products={form: table.scaled(by_rows) for form, table in profile.products.items()},
        attention=AttentionRates(
            attention.prompt.scaled(many), scaled(attention.decode), scaled(attention.decode_host)
        ),
        elementwise=profile.elementwise.scaled(few),
        logits=profile.logits.scaled(few),
        kv_append=scaled(profile.kv_append),
        unpack=scaled(profile.unpack),
        overheads=Overheads(**seconds),
        pace=now,
    )  # fmt: skip
