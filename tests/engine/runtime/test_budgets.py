"""No tier exceeds its budget; a policy that cannot fit is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import BudgetError, UsageError
from engine.memory.storage import ByteLedger
from engine.spec.hardware import Budgets, Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import Family, prompts
from tests.support.engine_runs import bytes_below, files_below, held

MIXED = Policy.parse(
    "weights=0.3/0.3/0.4,kv=0.3/0.3/0.4,activations=0.3/0.3/0.4,device_batch=2,num_device_batches=2"
)
LIMITS = {Tier.DEVICE: 100, Tier.HOST: 200, Tier.DISK: 300}


def test_ledger_adds_up() -> None:
    ledger = ByteLedger(LIMITS)
    ledger.charge(Tier.DEVICE, 60, "a")
    ledger.charge(Tier.DEVICE, 40, "b")
    ledger.charge(Tier.DISK, 300, "c")
    ledger.release(Tier.DEVICE, 60)
    ledger.charge(Tier.DEVICE, 10, "d")
    assert ledger.held == {Tier.DEVICE: 50, Tier.HOST: 0, Tier.DISK: 300}
    assert ledger.peak == {Tier.DEVICE: 100, Tier.HOST: 0, Tier.DISK: 300}


def test_ledger_refuses_and_charges_nothing() -> None:
    ledger = ByteLedger(LIMITS)
    ledger.charge(Tier.HOST, 150, "weights")
    with pytest.raises(BudgetError) as caught:
        ledger.charge(Tier.HOST, 51, "KV cache")
    error = caught.value
    assert (error.tier, error.needed, error.available) == ("host", 201, 200)
    message = str(error)
    assert "KV cache" in message and "host" in message and "201 bytes" in message and "200 bytes" in message
    assert "\n" not in message and error.exit_code == 2
    assert ledger.held[Tier.HOST] == ledger.peak[Tier.HOST] == 150
    ledger.charge(Tier.HOST, 50, "exactly full")


def test_one_memory_has_one_limit() -> None:
    ledger = ByteLedger(LIMITS, unified=True)
    ledger.charge(Tier.DEVICE, 150, "weights")
    ledger.charge(Tier.HOST, 50, "weights")
    with pytest.raises(BudgetError) as caught:
        ledger.charge(Tier.DEVICE, 1, "workspace")
    assert caught.value.tier == "host" and caught.value.needed == 201
    ledger.charge(Tier.DISK, 300, "disk is apart")


def test_ledger_counts_from_many_threads() -> None:
    ledger = ByteLedger(dict.fromkeys(Tier, 1 << 40))

    def churn() -> None:
        for _ in range(2000):
            ledger.charge(Tier.HOST, 3, "x")
            ledger.release(Tier.HOST, 2)

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.held[Tier.HOST] == 8000 <= ledger.peak[Tier.HOST] <= 8000 + 4 * 3


def planned(llama: Family, offload: Path, device: str, requests: list[Request]) -> dict[Tier, int]:
    """Planned bytes per tier for `MIXED`; the host's include the device's if they are one memory."""
    with Engine(llama.folder, MIXED, offload_dir=offload, device=device) as engine:
        plan = engine.check(requests)
    total = {tier: plan.total(tier) for tier in Tier}
    if device == "cpu":
        total[Tier.HOST] += total.pop(Tier.DEVICE)
    return total


@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize("tier", list(Tier))
def test_exact_budget_suffices_and_one_byte_less_is_refused(
    device: str, tier: Tier, llama: Family, offload: Path
) -> None:
    requests = [Request(prompt, 3) for prompt in prompts()[:6]]
    exact = planned(llama, offload, device, requests)
    if tier not in exact:
        pytest.skip("device and host are one memory")
    budgets = Budgets(**{name.value: count for name, count in exact.items()})
    with Engine(llama.folder, MIXED, budgets=budgets, offload_dir=offload, device=device) as engine:
        for request, output, expected in zip(requests, engine.answer(requests), llama.expected, strict=False):
            COMPARISON.check("llama", request, output, expected)
        memory = engine.record().memory
    assert all(memory[name.value].peak <= exact[name] for name in exact)
    short = dataclasses.replace(budgets, **{tier.value: exact[tier] - 1})
    with Engine(llama.folder, MIXED, budgets=short, offload_dir=offload, device=device) as engine:
        with pytest.raises(BudgetError) as caught:
            engine.answer(requests)
        assert engine._weights is None, "nothing was loaded"
        assert held(engine) == {"device": 0, "host": 0, "disk": 0}
        assert files_below(offload) == []
    error = caught.value
    assert (error.tier, error.needed, error.available) == (tier.value, exact[tier], exact[tier] - 1)
    flag = "--disk" if tier is Tier.DISK else f"--{tier.value}-memory"
    assert f"{exact[tier]:,} bytes" in str(error) and f"{exact[tier] - 1:,} bytes" in str(error)
    assert flag in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("policy", "budgets", "device"),
    [
        ("weights=device", Budgets(device=1000), "pretend"),
        ("weights=host", Budgets(host=1000), "pretend"),
        ("weights=disk", Budgets(disk=1000), "cpu"),
        ("kv=disk", Budgets(disk=1000), "cpu"),
        ("activations=disk", Budgets(disk=1000), "cpu"),
        ("weights=device", Budgets(host=1000), "cpu"),
        ("kv=host", Budgets(host=0), "pretend"),
    ],
)
def test_too_small_budget_is_refused_before_loading(
    policy: str, budgets: Budgets, device: str, llama: Family, offload: Path
) -> None:
    with Engine(
        llama.folder, Policy.parse(policy), budgets=budgets, offload_dir=offload, device=device
    ) as engine:
        with pytest.raises(BudgetError):
            engine.check([Request((5, 6), 3)])
        with pytest.raises(BudgetError):
            engine.answer([Request((5, 6), 3)])
        assert engine._weights is None and files_below(offload) == []


def test_device_budget_means_nothing_on_one_memory(llama: Family, offload: Path) -> None:
    with pytest.raises(UsageError, match="--device-memory has no meaning"):
        Engine(llama.folder, budgets=Budgets(device=1 << 30), offload_dir=offload, device="cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", ""])
def test_unknown_device_is_refused(name: str, llama: Family, offload: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Engine(llama.folder, offload_dir=offload, device=name)
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
def test_files_never_exceed_the_disk_budget(schedule: str, llama: Family, offload: Path) -> None:
    """More requests than slots, so that files come and go; their sizes are checked after every pass."""
    requests = [Request(prompt, 4) for prompt in prompts((9, 1, 30, 4, 12, 7, 3, 22, 15, 2))]
    policy = Policy.parse(
        f"weights=disk,kv=disk,activations=disk,device_batch=2,num_device_batches=2,schedule={schedule}"
    )
    with Engine(llama.folder, policy, offload_dir=offload, device="cpu") as engine:
        plan = engine.check(requests)
        budget, in_model_files = plan.total(Tier.DISK), plan.tiers[Tier.DISK]["weights"]
    with Engine(
        llama.folder, policy, budgets=Budgets(disk=budget), offload_dir=offload, device="cpu"
    ) as engine:
        sizes: list[tuple[int, int]] = []
        engine.answer(
            requests,
            on_progress=lambda _: sizes.append((bytes_below(offload) + in_model_files, held(engine)["disk"])),
        )
        peak = engine.record().memory["disk"].peak
    assert all(on_disk <= ledger <= budget for on_disk, ledger in sizes)
    assert max(on_disk for on_disk, _ in sizes) > 0.5 * budget
    assert max(ledger for _, ledger in sizes) <= peak <= budget


@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
def test_only_weights_stay_between_calls(device: str, schedule: str, llama: Family, offload: Path) -> None:
    requests = [Request(prompt, 3) for prompt in prompts()]
    policy = dataclasses.replace(MIXED, schedule=schedule)
    with Engine(llama.folder, policy, offload_dir=offload, device=device) as engine:
        engine.answer(requests[:1])
        after_one = held(engine)
        engine.answer(requests)
        assert held(engine) == after_one
        plan = engine.check(requests)
        for tier in Tier:
            own = plan.tiers[tier].get("weights", 0) + plan.tiers[tier].get("weight buffers", 0)
            assert own <= after_one[tier.value] <= own + plan.tiers[tier].get("staging", 0) + 4096 * 40
    assert files_below(offload) == []


def test_resident_weights_are_all_that_is_kept(llama: Family, offload: Path) -> None:
    with Engine(llama.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        engine.answer([Request((5, 6, 7), 3)])
        assert held(engine) == {"device": 4 * engine.spec.num_parameters, "host": 0, "disk": 0}
    assert files_below(offload) == []


def test_closed_engine_holds_nothing_and_can_be_asked_again(llama: Family, offload: Path) -> None:
    engine = Engine(llama.folder, MIXED, offload_dir=offload, device="pretend")
    first = engine.answer([Request((5, 6, 7), 3)])
    engine.close()
    engine.close()
    assert held(engine) == {"device": 0, "host": 0, "disk": 0}
    with engine:
        assert engine.answer([Request((5, 6, 7), 3)])[0].tokens == first[0].tokens
    assert files_below(offload) == []
