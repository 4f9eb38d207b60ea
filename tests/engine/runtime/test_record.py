"""A run's record is JSON, its streams' figures add up, and browsers open its trace."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord
from engine.spec.request import Request
from engine.trace import STREAMS, Trace
from tests.support.engine_models import Family, prompts

REQUESTS = [Request(prompt, 3) for prompt in prompts()[:5]]
DISK = "weights=disk,kv=disk,activations=disk,device_batch=2,num_device_batches=2"


def test_record_is_json_and_complete(llama: Family, offload: Path) -> None:
    policy = Policy.parse(DISK)
    with Engine(
        llama.folder, policy, budgets=Budgets(disk=1 << 30), offload_dir=offload, device="pretend"
    ) as engine:
        before = engine.record()
        engine.answer(REQUESTS)
        record = engine.record()
    assert EngineRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert EngineRecord.from_json(json.loads(json.dumps(before.to_json()))) == before
    assert record.kind == "measured"
    assert record.model.architecture == "LlamaForCausalLM" and record.model.weights == "trained"
    assert record.model.num_parameters == sum(p.numel() for p in llama.model.parameters())
    assert record.run_policy() == policy
    for tier, memory in record.memory.items():
        assert 0 < memory.peak <= memory.planned, tier
    assert record.memory["disk"].budget == 1 << 30 and record.memory["host"].budget is None
    assert set(record.streams) == set(STREAMS)
    assert "pretend" in record.hardware.device
    assert {"python", "torch", "transformers", "tierbench"} <= set(record.software)


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
def test_weights_cross_once_per_pass(schedule: str, llama: Family, offload: Path) -> None:
    """Every pass reads every layer once, and single rows of the input embeddings, for all device batches."""
    with Engine(
        llama.folder, Policy.parse(f"{DISK},schedule={schedule}"), offload_dir=offload, device="cpu"
    ) as engine:
        engine.answer(REQUESTS)
        record = engine.record()
        first, *others = engine.spec.stages
        whole = sum(engine.spec.tensors[name].nbytes for names in others for name in names)
    assert [name for name in first if not engine.spec.tensors[name].table] == []
    assert record.totals.passes > 3
    assert record.streams["weights"].bytes == whole * record.totals.passes


@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_kv_cache_on_disk_is_written_by_the_unit_and_read_once_per_pass(
    device: str, llama: Family, offload: Path
) -> None:
    """One sequence of 20 + 8 tokens; 8 rows of a layer fill a unit, the rest is kept in memory."""
    policy = Policy.parse("kv=disk,device_batch=1,num_device_batches=1")
    (prompt,) = prompts((20,))
    with Engine(llama.folder, policy, offload_dir=offload, device=device) as engine:
        engine.answer([Request(prompt, 8)])
        streams = engine.record().streams
        row = 4 * sum(key + value for key, value in engine.spec.kv_widths)
    unit = 4096 * engine.spec.num_layers
    assert unit == 8 * row
    read = (
        4 * 2 * unit + 3 * 3 * unit
    )  # after 20 to 23 tokens, after 24 to 26; the last one is never computed
    written = 2 * unit + unit  # the prompt's, and one that is full with the 24th token
    if (
        device == "pretend"
    ):  # and from host to device, all of it, and back: the unit with what was in the tail
        read += sum(range(20, 27)) * row
        written += 20 * row + 3 * row + 8 * row + 2 * row
    assert streams["kv_in"].bytes == read
    assert streams["kv_out"].bytes == written


def test_resident_run_moves_nothing(llama: Family, offload: Path) -> None:
    with Engine(llama.folder, Policy(), offload_dir=offload, device="pretend") as engine:
        engine.answer(REQUESTS)
        streams = engine.record().streams
    assert [streams[stream].bytes for stream in STREAMS] == [0, 0, 0, 0]
    assert streams["compute"].busy_seconds > 0


def test_trace_is_a_chrome_trace(llama: Family, offload: Path, tmp_path: Path) -> None:
    with Engine(llama.folder, Policy.parse(DISK), offload_dir=offload, device="cpu") as engine:
        engine.answer(REQUESTS)
        engine.trace.write_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == set(STREAMS)
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert {event["cat"] for event in spans} == set(STREAMS)
    for stream in STREAMS:  # a stream runs one job at a time; times are rounded to tenths of a microsecond
        mine = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["cat"] == stream)
        assert all(end <= begin + 0.25 for (_, end), (begin, _) in itertools.pairwise(mine))


def test_trace_keeps_sums_of_all_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace._MAX_SPANS", 10)
    trace = Trace()
    for _ in range(25):
        with trace.span("weights", "x") as span:
            span.bytes = 4
    assert (len(trace.spans), trace.dropped, trace.bytes["weights"]) == (10, 15, 100)
    assert trace.summary(0.0)["weights"].share == 0.0
