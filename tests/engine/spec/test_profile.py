"""Hardware profiles are written and read; malformed or impossible ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ProfileError
from engine.plan.paper.named import find_profile, profile_names, published_profile
from engine.spec.hardware import Tier
from engine.spec.profile import HardwareProfile, kv_key
from engine.spec.rates import RateTable, Resource
from tests.support.profiles import make_profile


def test_a_file_holds_all(tmp_path: Path) -> None:
    profile = make_profile(slowdown={Resource.COMPUTE: {Resource.DISK_READ: 1.25}}, notes={"date": "today"})
    profile.save(tmp_path / "made-up.json")
    assert HardwareProfile.load(tmp_path / "made-up.json") == profile
    assert find_profile(str(tmp_path / "made-up.json")) == profile


@pytest.mark.parametrize("name", ["a6000", "h200", "rtx3090", "t4"])
def test_those_that_ship(name: str) -> None:
    profile = published_profile(name)
    assert name in profile_names() and profile.source and profile.notes
    assert not profile.unified and profile.attention.decode_host
    assert HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_the_paper_s_machine() -> None:
    t4 = published_profile("t4")
    assert t4.link(Tier.DISK, Tier.HOST).bandwidth.at(1 << 30) == 2e9
    assert t4.link(Tier.HOST, Tier.DISK).bandwidth.at(1 << 30) == 1e9


WRONG = [
    ({"format": "something"}, "not a profile"),
    ({"version": 99}, "version 99"),
    ({"extra": 1}, "unknown fields: extra"),
    ({"capacity": {"device": -1, "host": 1, "disk": 1}}, "capacity.device is negative: -1"),
    ({"capacity": {"device": 1.5, "host": 1, "disk": 1}}, "capacity"),
    ({"memory_bandwidth": {"device": 0, "host": 1}}, "memory bandwidth of device is 0"),
    ({"links": []}, "no link from disk to host"),
    ({"links": [{"source": "moon", "target": "host", "bandwidth": 1}]}, "links"),
    ({"elementwise": -1}, "rate of -1"),
    ({"elementwise": {"xs": [2, 1], "rates": [[1], [1]]}}, "ascending"),
    ({"elementwise": {"xs": [1, 2], "rates": [[1]]}}, "rows"),
    ({"logits": "fast"}, "not a rate table"),
    ({"overheads": {"per_pass": -1}}, "overhead per_pass"),
    ({"overheads": {"per_moon": 1}}, "overheads"),
    ({"slowdown": {"compute": {"disk read": 0.5}}}, "at least 1"),
    ({"products": {}}, "no products"),
    ({"unified": 1}, "unified is not a bool"),
    ({"unified": True}, "give both the same"),
    ({"kind": "dreamt"}, "kind"),
]


@pytest.mark.parametrize("change,words", WRONG)
def test_what_is_wrong_is_named(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**make_profile().to_dict(), **change}))
    with pytest.raises(ProfileError, match=words) as refused:
        HardwareProfile.load(path)
    assert "wrong.json" in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    content = make_profile().to_dict()
    del content["logits"], content["attention"]
    with pytest.raises(ProfileError, match="lacks attention, logits"):
        HardwareProfile.from_dict(content)
    (tmp_path / "cut.json").write_text('{"format"')
    with pytest.raises(ProfileError, match="is not JSON"):
        HardwareProfile.load(tmp_path / "cut.json")
    with pytest.raises(ProfileError, match="cannot be read"):
        HardwareProfile.load(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="one of a6000, h200, rtx3090, t4"):
        find_profile("t5")


points = st.lists(st.floats(1, 1e6), min_size=1, max_size=5, unique=True)


@given(points, st.data())
def test_a_table_gives_its_points_and_stays_between_them(xs: list[float], data: st.DataObject) -> None:
    rates = data.draw(st.lists(st.floats(1, 1e12), min_size=len(xs), max_size=len(xs)))
    table = RateTable.line(dict(zip(xs, rates, strict=True)))
    for x, rate in zip(xs, rates, strict=True):
        assert table.at(x) == pytest.approx(rate)
    somewhere = data.draw(st.floats(0.5, 2e6))
    assert min(rates) * (1 - 1e-9) <= table.at(somewhere) <= max(rates) * (1 + 1e-9)


def test_a_table_of_two_quantities() -> None:
    table = RateTable(((1.0, 4.0), (16.0, 64.0)), (1.0, 100.0), (1.0, 10.0))
    assert table.at(10, 1) == pytest.approx(4)
    assert table.at(1, 10**0.5) == pytest.approx(2)
    assert table.at(1000, 1000) == 64


def test_the_nearest_format_stands_in() -> None:
    tables = {
        name: RateTable.constant(index + 1) for index, name in enumerate(("float32", "float16", "4", "8"))
    }
    profile = make_profile(products=tables)
    assert profile.product("4").at(1) == 3
    assert profile.product("3-g32").at(1) == 3
    assert profile.product("8-row-symmetric").at(1) == 4
    assert profile.product("bfloat16").at(1) == 2


def test_integers_stand_in_for_integers() -> None:
    rounded = ("8-row-symmetric-a8", "4-g32-symmetric-mse-a8")
    tables = {name: RateTable.constant(i + 1) for i, name in enumerate((*rounded, "4", "8"))}
    profile = make_profile(products=tables)
    assert profile.product("4-g64-symmetric-a8").at(1) == 2
    assert profile.product("4-column").at(1) == profile.product("4-g32-symmetric-column-mse").at(1) == 3
    assert make_profile(products={"4": RateTable.constant(5)}).product(rounded[1]).at(1) == 5


def test_the_nearest_sharing_stands_in() -> None:
    from engine.spec.rates import AttentionRates

    decode = {kv_key("float16", n): RateTable.constant(n) for n in (1, 4, 8)}
    profile = make_profile(attention=AttentionRates(RateTable.constant(1), decode))
    assert profile.decoding("float16", 4).at(1) == 4
    assert profile.decoding("float16", 7).at(1) == 8
    with pytest.raises(ProfileError, match="on the host"):
        profile.decoding("float16", 1, on_host=True)
