"""A profile at another pace: computing scales with the processor's, reading with the disk's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.errors import ProfileError
from engine.plan.paper.named import published_profile
from engine.plan.simulation.pace import FEW, MANY, at_pace
from engine.prediction import simulate_shipped
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.rates import Pace

THEN = Pace(few=2e9, many=3e9, read=4e9)


@pytest.fixture
def known() -> HardwareProfile:
    return replace(published_profile("t4"), pace=THEN)


def test_rates_go_with_their_kind(known: HardwareProfile) -> None:
    slower = at_pace(known, Pace(few=1e9, many=3e9, read=1e9))
    form = next(iter(known.products))
    for rows, factor in ((1, 0.5), (FEW, 0.5), (MANY, 1.0), (10 * MANY, 1.0)):
        if rows in known.products[form].xs:
            assert slower.product(form).at(rows) == pytest.approx(factor * known.product(form).at(rows))
    assert slower.attention.prompt.at(64) == known.attention.prompt.at(64)
    assert slower.logits.at(1) == pytest.approx(known.logits.at(1) / 2)
    assert slower.overheads.per_layer == pytest.approx(2 * known.overheads.per_layer)
    for source, target, factor in ((Tier.DISK, Tier.HOST, 0.25), (Tier.HOST, Tier.DEVICE, 1.0)):
        before, after = known.link(source, target), slower.link(source, target)
        assert after.bandwidth.at(1 << 20) == pytest.approx(factor * before.bandwidth.at(1 << 20))


def test_between_few_rows_and_many_a_rate_goes_with_both() -> None:
    by = at_pace(
        replace(published_profile("t4"), pace=THEN), Pace(few=THEN.few / 4, many=THEN.many, read=THEN.read)
    )
    table = by.products[next(iter(by.products))]
    original = published_profile("t4").products[next(iter(by.products))]
    shares = [table.rates[i][0] / original.rates[i][0] for i in range(len(table.xs))]
    assert shares == sorted(shares) and 0.25 <= shares[0] <= shares[-1] <= 1


def test_a_slower_machine_takes_longer_and_its_own_pace_changes_nothing(known: HardwareProfile) -> None:
    policy = Policy.parse("weights=0.2/0.4/0.4,kv=device,device_batch=4,num_device_batches=2")

    def seconds(profile: HardwareProfile) -> float:
        return simulate_shipped("opt-125m", policy, [(32, 4)] * 8, profile).estimate.seconds

    half = Pace(THEN.few / 2, THEN.many / 2, THEN.read / 2)
    assert seconds(at_pace(known, THEN)) == pytest.approx(seconds(known))
    assert seconds(known) < seconds(at_pace(known, half)) <= 2.01 * seconds(known)
    assert at_pace(replace(known, pace=None), half) == replace(known, pace=None), "nothing to compare with"


def test_a_pace_of_nothing_is_refused(known: HardwareProfile) -> None:
    with pytest.raises(ProfileError, match=r"pace read is 0\.0: give a number above 0"):
        replace(known, pace=Pace(1.0, 1.0, 0.0))
    with pytest.raises(ProfileError, match=r"pace\.many is missing"):
        HardwareProfile.from_dict({**known.to_dict(), "pace": {"few": 1.0}})
    assert HardwareProfile.from_dict(known.to_dict()) == known
