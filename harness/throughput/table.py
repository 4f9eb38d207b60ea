"""The paper's throughput tables on this machine: cells that it can hold are run, the others are simulated.

A cell is run if its policy fits this machine and is predicted to end in time; else it is simulated on the
profile that was asked for. Every figure says which of the two it is, and of which machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.errors import BudgetError, InfeasibleError
from engine.planner import Constraints, Workload, make_plan, plan_for, spec_for
from engine.prediction import simulate_shipped
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.units import format_seconds
from harness.engines.auto import AUTO
from harness.throughput.engines import Maker, Projection, run
from harness.throughput.load import SIMULATED, Load, Times

FORMATS = {"16 bits": "16", "4 bits": "4"}
"""How weights and KV cache are kept, by the name of the column."""

MODELS = ("opt-6.7b", "opt-30b", "opt-175b")

SEARCHED = 256
"""Requests among which a block is looked for where no number is given."""


@dataclass(frozen=True)
class PaperTable:
    """One table: the load, and the models that it has."""

    prompt_len: int
    gen_len: int
    models: tuple[str, ...] = MODELS


TABLES = {
    "throughput-256": PaperTable(256, 32),
    "throughput-512": PaperTable(512, 32),
    "throughput-1024": PaperTable(1024, 32),
    "throughput-128-128": PaperTable(128, 128, MODELS[:1]),
    "throughput-512-8": PaperTable(512, 8, MODELS[:1]),
}
"""FlexGen paper, tables 2 and 14 to 16, and its repository's two further loads of the smallest model."""


@dataclass(frozen=True)
class TableOptions:
    """How a table's cells are filled."""

    policy: str
    known: dict[str, Policy]
    own: HardwareProfile
    """Of this machine: says what would take how long here."""

    elsewhere: HardwareProfile
    """On which cells are simulated that are not run."""

    at_most: float
    """Seconds that a cell may take."""

    projection: Projection = field(default_factory=Projection)
    requests: int | None = None
    """Of each cell; one block where it is None."""


def fill(
    table: PaperTable, options: TableOptions, maker_of: Callable[[str], Maker]
) -> Iterator[dict[str, Any]]:
    """Fill the cells one after the other; what concerns all, such as a malformed policy, is raised."""
    for model in table.models:
        for formats in FORMATS:
            yield _cell(table, model, formats, options, maker_of(model))


def _cell(table: PaperTable, model: str, formats: str, options: TableOptions, maker: Maker) -> dict[str, Any]:
    """Run here if it fits and ends in time, else simulated elsewhere, else the reason why neither."""
    row: dict[str, Any] = {"model": model, "formats": formats, "weights": "random"}
    own, elsewhere = options.own, options.elsewhere
    try:
        policy, load = _planned(table, model, formats, options, own, maker.settings.budgets)
        with maker.engine(policy) as engine:
            engine.check(load.prompts(engine.spec.vocab_size))
        times = _simulated(model, policy, load, own)
    except InfeasibleError as error:
        why = f"on {own.name} {error}"
    except BudgetError as error:
        why = f"does not fit here: {error.tier} needs more than it has"
    else:
        seconds = times.prefill_seconds + times.decode_seconds
        if seconds <= options.at_most or options.projection != Projection():
            (measured,) = run(maker, policy, load, own, options.projection)
            return {**row, **_about(policy, load, own), **measured.to_dict()}
        why = f"not run here: would take {format_seconds(seconds)}"
    try:
        policy, load = _planned(table, model, formats, options, elsewhere, Budgets())
        times = _simulated(model, policy, load, elsewhere)
    except (InfeasibleError, BudgetError) as error:
        row |= {"policy": options.policy, "block": "-", "machine": elsewhere.name, "kind": SIMULATED}
        return {**row, "note": f"{why}; on {elsewhere.name} {error}"}
    return {**row, **_about(policy, load, elsewhere), **times.to_dict(load), "note": why}


def _planned(
    table: PaperTable, model: str, formats: str, options: TableOptions, profile: HardwareProfile,
    budgets: Budgets,
) -> tuple[Policy, Load]:  # fmt: skip
    """A cell's policy and load on a machine; raises InfeasibleError where no policy fits."""
    kept = FORMATS[formats]
    if options.policy == AUTO:
        load = Workload.uniform(table.prompt_len, table.gen_len, options.requests or SEARCHED)
        constraints = Constraints(weight_formats=(kept,), kv_formats=(kept,), budgets=budgets)
        policy = make_plan(profile, spec_for(model, profile), load, constraints, explain=False).best.policy
    else:
        text = f"{options.policy},weight_quant={kept},kv_quant={kept}"
        policy = Policy.parse(text, options.known).replace(name=options.policy)
    return policy, Load(table.prompt_len, table.gen_len, options.requests or policy.block_size)


def _simulated(model: str, policy: Policy, load: Load, profile: HardwareProfile) -> Times:
    shapes = [(load.prompt_len, load.gen_len)] * load.requests
    return Times.predicted(simulate_shipped(model, policy, shapes, profile))


def _about(policy: Policy, load: Load, profile: HardwareProfile) -> dict[str, Any]:
    return {
        "policy": policy.name,
        "policy_keys": policy.to_dict(),
        "block": f"{policy.device_batch}x{policy.num_device_batches}",
        "machine": profile.name,
        "profile": profile.name,
        "load": asdict(load),
    }


def planned_policy(maker: Maker, load: Load, profile: HardwareProfile, kept: Policy) -> Policy:
    """The planner's policy for a load on this machine, within what is free now.

    Args:
        kept: has the formats to be kept.

    Raises:
        InfeasibleError: if no policy fits.
    """
    with maker.engine(kept) as engine:
        requests = load.prompts(engine.spec.vocab_size)
        return plan_for(engine, requests, profile, maker.settings.budgets, kept).best.policy
