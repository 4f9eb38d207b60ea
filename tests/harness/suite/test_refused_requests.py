"""A request that exceeds the budget is refused by name; the rest of the suite finishes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import BudgetError
from engine.spec.hardware import Budgets, Tier
from engine.spec.policy import Policy, PrefixSharing
from engine.spec.request import Request
from harness.suite.runner import run_suite
from tests.harness.conftest import OptionsMaker, with_settings
from tests.support.counting_engine import CountingEngine

pytest.importorskip("helm.benchmark")

ONE = Policy.parse("name=one,device_batch=1,num_device_batches=1,kv=device,max_batch_tokens=16")


class AskedEngine(CountingEngine):
    """Records a suite's requests, so that a test can find a budget that some of them exceed."""

    asked: list[Request] = []

    def check(self, requests: Sequence[Request]) -> Any:
        AskedEngine.asked = list(requests)
        return super().check(requests)


def needs(model: str, policy: Policy, folder: Path) -> list[int]:
    """Bytes of the device tier that each of the last requests needs alone, and all need together."""
    with Engine(model, policy, device="pretend", offload_dir=folder / "offload") as engine:
        alone = [engine.check([request]).total(Tier.DEVICE) for request in AskedEngine.asked]
        return [*alone, engine.check(AskedEngine.asked).total(Tier.DEVICE)]


def test_a_run_that_holds_such_a_request_fails_and_the_others_are_scored(
    make_options: OptionsMaker, tmp_path: Path
) -> None:
    entries = ["toy_joint", "toy_ranking"]
    most = {}
    for entry in entries:
        options = make_options(tmp_path / entry, run_entries=[entry], policies=[ONE], device="pretend")
        assert not run_suite(options, AskedEngine).failures
        most[entry] = max(needs(options.settings.model, ONE, tmp_path))
    assert most["toy_joint"] < most["toy_ranking"]
    both = make_options(tmp_path / "both", run_entries=entries, policies=[ONE], device="pretend")
    result = run_suite(with_settings(both, budgets=Budgets(device=most["toy_joint"])))
    (failure,) = result.failures
    assert "\n" not in failure and "device tier" in failure
    assert "run entry 'toy_ranking', policy one: 12 of 12 requests are not answered" in failure
    assert "prompt tokens and 5 to generate" in failure
    assert [row.run_entry for row in result.rows] == ["toy_joint"]


def test_a_block_that_is_too_large_is_the_users_matter(make_options: OptionsMaker, tmp_path: Path) -> None:
    """Every request fits alone: none is set aside, and the error names the budget."""
    policy = ONE.replace(device_batch=4, prefix_sharing=PrefixSharing.OFF)
    options = make_options(tmp_path, policies=[policy], device="pretend")
    run_suite(options, AskedEngine)
    *alone, together = needs(options.settings.model, policy, tmp_path)
    assert max(alone) < together
    changed = with_settings(options, budgets=Budgets(device=together - 1))
    with pytest.raises(BudgetError, match="device tier"):
        run_suite(dataclasses.replace(changed, suite="less"))
