"""A request that no budget holds is refused by name; the rest of the suite finishes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import BudgetError
from engine.spec.hardware import Budgets, Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from harness.run import run_suite
from tests.harness.conftest import OptionsMaker
from tests.support.counting_engine import CountingEngine

pytest.importorskip("helm.benchmark")

ONE = Policy.parse("name=one,device_batch=1,num_device_batches=1,kv=host,max_batch_tokens=16")


class AskedEngine(CountingEngine):
    """Notes what a suite asks, so that a budget between its requests can be found."""

    asked: list[Request] = []

    def check(self, requests: Sequence[Request]) -> Any:
        AskedEngine.asked = list(requests)
        return super().check(requests)


def test_a_run_that_holds_such_a_request_fails_and_the_others_are_scored(
    make_options: OptionsMaker, tmp_path: Path
) -> None:
    entries = ["toy_generation", "toy_language_modeling"]
    whole = make_options(tmp_path / "whole", run_entries=entries, policies=[ONE], device="pretend")
    assert not run_suite(whole, AskedEngine).failures
    with Engine(whole.model, ONE, device="pretend", offload_dir=tmp_path / "offload") as engine:
        needed = {engine.check([request]).total(Tier.HOST): request for request in AskedEngine.asked}
    largest = max(needed)
    less = make_options(
        tmp_path / "less",
        run_entries=entries,
        policies=[ONE],
        device="pretend",
        budgets=Budgets(host=largest - 1),
    )
    result = run_suite(less)
    (failure,) = result.failures
    assert "\n" not in failure and "host tier" in failure and "policy one" in failure
    assert f"{len(needed[largest].prompt):,} prompt tokens" in failure and "1 of" in failure
    assert [row.run_entry for row in result.rows] == [entry for entry in entries if entry not in failure]
    assert len(result.rows) == 1


def test_a_block_that_is_too_large_is_still_the_users_matter(
    make_options: OptionsMaker, tmp_path: Path
) -> None:
    """Every request fits alone: nothing is set aside, the budget is named."""
    policy = ONE.replace(device_batch=8, num_device_batches=4)
    options = make_options(tmp_path, policies=[policy], device="pretend")
    with Engine(options.model, ONE, device="pretend", offload_dir=tmp_path / "offload") as engine:
        run_suite(make_options(tmp_path / "asked", policies=[ONE], device="pretend"), AskedEngine)
        alone = max(engine.check([request]).total(Tier.HOST) for request in AskedEngine.asked)
    with pytest.raises(BudgetError, match="host tier"):
        run_suite(
            make_options(tmp_path, policies=[policy], device="pretend", budgets=Budgets(host=alone + 1))
        )
