"""A machine is measured by the engine's own code, and its profile is recognised."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import ProfileError, UsageError
from engine.prediction import predict, shipped_model, simulate_shipped
from engine.profiler import check_machine, grid, measure_profile, profile_name
from engine.profiling.passes import predict_passes
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile, ProfileKind
from engine.spec.rates import Resource
from engine.spec.request import Request
from tests.support.tiny_models import save_tiny_opt


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> HardwareProfile:
    """A profile of the pretend device, which has all three tiers, measured at very few points."""
    steps: list[str] = []
    folder = tmp_path_factory.mktemp("offload")
    measured = measure_profile("pretend", folder, seconds=0.5, on_step=steps.append)
    assert {"disk", "products", "attention", "overheads", "slowdown"} <= set(steps)
    assert list(folder.iterdir()) == [], "scratch files stay behind"
    return measured


def test_everything_is_measured(profile: HardwareProfile) -> None:
    assert profile.kind is ProfileKind.MEASURED and not profile.unified
    assert {"float32", "4"} <= profile.products.keys()
    for source, target in (
        (Tier.DISK, Tier.HOST), (Tier.HOST, Tier.DISK), (Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST),
    ):  # fmt: skip
        link = profile.link(source, target)
        assert link.latency >= 0 and link.bandwidth.at(1 << 20) > 0
    assert profile.attention.decode.keys() == {"float32@1", "4@1"}
    assert profile.kv_append.keys() == {"float32", "4"} and "4" in profile.unpack
    assert profile.overheads.per_layer > 0 and profile.overheads.per_pass > 0
    assert set(profile.slowdown[Resource.COMPUTE]) >= {Resource.DISK_READ, Resource.TO_DEVICE}


def test_a_file_holds_all_of_it_and_no_path(profile: HardwareProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "deep" / "mine.json")
    text = (tmp_path / "deep" / "mine.json").read_text()
    assert HardwareProfile.load(tmp_path / "deep" / "mine.json") == profile
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert json.loads(text)["notes"]["software"]["torch"]


def test_a_profile_of_another_machine_is_noticed(profile: HardwareProfile) -> None:
    check_machine(profile, "pretend")
    with pytest.raises(ProfileError, match=r"device='pretend.*run_helm\.py profile --device cpu"):
        check_machine(profile, "cpu")
    other = replace(profile, machine={**profile.machine, "torch": "1.0"})
    with pytest.raises(ProfileError, match=r"torch='1\.0', here it is"):
        check_machine(other, "pretend")


def test_its_name_is_fit_for_a_file() -> None:
    name = profile_name("pretend")
    assert name == name.lower() and "pretend" in name and "/" not in name and " " not in name


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device 'tpu' is unknown"):
        measure_profile("tpu", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="offload folder"):
        measure_profile("cpu", tmp_path / "file")


def test_passes_are_predicted_from_it(profile: HardwareProfile, tmp_path: Path) -> None:
    folder = save_tiny_opt(tmp_path / "model")
    requests = [Request((5,) * length, 3) for length in (4, 9, 6)]
    policy = Policy.parse("weights=host,kv=disk,device_batch=2,num_device_batches=2")
    with Engine(folder, policy, device="pretend", offload_dir=tmp_path / "offload") as engine:
        passes = predict_passes(engine, requests, profile)
        whole = predict(engine, requests, profile)
        engine.answer(requests)
        record = engine.record()
    assert len(passes) == record.totals.passes
    assert whole.estimate.seconds == pytest.approx(sum(seconds for _, seconds in passes))
    assert all(whole.planned[tier.value] >= record.memory[tier.value].peak for tier in Tier)


def test_slower_links_never_make_a_prediction_faster(profile: HardwareProfile) -> None:
    slow = replace(
        profile, links=tuple(replace(link, bandwidth=link.bandwidth.scaled(0.1)) for link in profile.links)
    )
    policy = Policy.parse("weights=host,kv=host,device_batch=2,num_device_batches=2,host_attention=off")
    fast, slower = (
        simulate_shipped("opt-125m", policy, [(32, 4)] * 4, one).estimate.seconds for one in (profile, slow)
    )
    assert slower > fast


def test_shipped_configs_make_shortened_models() -> None:
    with shipped_model("opt-30b", layers=3) as folder:
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    assert not folder.exists()


def test_rates_of_one_point_are_averaged_by_time() -> None:
    table = grid({(1.0, 2.0): [1.0, 3.0], (4.0, 2.0): [5.0]})
    assert table.at(1, 2) == pytest.approx(1.5) and table.at(4, 2) == 5


def test_overheads_are_no_more_than_a_pass_takes(profile: HardwareProfile) -> None:
    assert all(0 <= seconds < 1 for seconds in asdict(profile.overheads).values())
