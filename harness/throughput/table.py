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
from harness.throughput.engines import Maker, OnProgress, Projection, run
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
    table: PaperTable,
    options: TableOptions,
    maker_of: Callable[[str], Maker],
    on_progress: OnProgress = lambda progress: None,
) -> Iterator[dict[str, Any]]:
    """Fill the cells one after the other; what concerns all, such as a malformed policy, is raised."""
    for model in table.models:
        for name, formats in FORMATS.items():
            yield _cell(table, model, name, formats, options, maker_of(model), on_progress)


def _cell(
    table: PaperTable, model: str, name: str, formats: str, options: TableOptions, maker: Maker,
    on_progress: OnProgress,
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"model": model, "formats": name, "weights": "random"}
    found = _here(table, model, formats, options, maker)
    if isinstance(found, tuple):
        policy, load, seconds = found
        if seconds <= options.at_most or options.projection != Projection():
            (measured,) = run(maker, policy, load, options.own, options.projection, 1, on_progress)
            return {**row, **_about(policy, load, options.own), **measured.to_dict()}
        found = f"not run here: would take {format_seconds(seconds)}"
    chosen = _policy(table, model, formats, options, options.elsewhere)
    if isinstance(chosen, str):
        return {**row, **_nothing(options, f"{found}; {chosen}")}
    load = Load(table.prompt_len, table.gen_len, options.requests or chosen.block_size)
    try:
        times = _simulated(model, chosen, load, options.elsewhere)
    except BudgetError as error:
        return {**row, **_nothing(options, f"{found}; on {options.elsewhere.name} {error}")}
    return {**row, **_about(chosen, load, options.elsewhere), **times.to_dict(load), "note": found}


def _here(
    table: PaperTable, model: str, formats: str, options: TableOptions, maker: Maker
) -> tuple[Policy, Load, float] | str:
    """What would run on this machine and how long it would take, or why it does not."""
    policy = _policy(table, model, formats, options, options.own, maker.settings.budgets)
    if isinstance(policy, str):
        return policy
    load = Load(table.prompt_len, table.gen_len, options.requests or policy.block_size)
    try:
        with maker.engine(policy) as engine:
            engine.check(load.prompts(engine.spec.vocab_size))
        times = _simulated(model, policy, load, options.own)
    except BudgetError as error:
        return f"does not fit here: {error.tier} needs more than it has"
    return policy, load, times.prefill_seconds + times.decode_seconds


def _simulated(model: str, policy: Policy, load: Load, profile: HardwareProfile) -> Times:
    shapes = [(load.prompt_len, load.gen_len)] * load.requests
    return Times.predicted(simulate_shipped(model, policy, shapes, profile))


def _policy(
    table: PaperTable, model: str, formats: str, options: TableOptions, profile: HardwareProfile,
    budgets: Budgets | None = None,
) -> Policy | str:  # fmt: skip
    """The policy of a cell on a machine; text that says why there is none."""
    if options.policy != AUTO:
        text = f"{options.policy},weight_quant={formats},kv_quant={formats}"
        return Policy.parse(text, options.known).replace(name=options.policy)
    load = Workload.uniform(table.prompt_len, table.gen_len, options.requests or SEARCHED)
    constraints = Constraints(weight_formats=(formats,), kv_formats=(formats,), budgets=budgets or Budgets())
    try:
        plan = make_plan(profile, spec_for(model, profile), load, constraints, explain=False)
        return plan.best.policy
    except InfeasibleError as error:
        return f"on {profile.name} {error}"


def _about(policy: Policy, load: Load, profile: HardwareProfile) -> dict[str, Any]:
    return {
        "policy": policy.name,
        "policy_keys": policy.to_dict(),
        "block": f"{policy.device_batch}x{policy.num_device_batches}",
        "machine": profile.name,
        "profile": profile.name,
        "load": asdict(load),
    }


def _nothing(options: TableOptions, why: str) -> dict[str, Any]:
    machine = options.elsewhere.name
    return {"policy": options.policy, "block": "-", "machine": machine, "kind": SIMULATED, "note": why}


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
