"""A run's record is JSON, its streams' figures add up, and browsers open its trace."""

from __future__ import annotations

import itertools
import json
import mmap
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.machine import forget_peak, peak_rss
from engine.plan.workload import Operations
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


@pytest.mark.parametrize("early", ["on", "off"])
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_shares_of_the_passes_sum_to_them(early: str, sharing: str, llama: Family, offload: Path) -> None:
    """Also where the block empties, prefixes are shared, and some requests own no token of their own."""
    common = prompts((24,), seed=3)[0]
    requests = [Request(common + own, 1 + 7 * (i == 0)) for i, own in enumerate(prompts((9, 8, 7, 6, 5)))]
    requests += [Request(prompt, 2, prompt_logprobs=True) for prompt in prompts((12, 3), seed=4)]
    requests += [Request(common, prompt_logprobs=True), Request((*common, 5), prompt_logprobs=True)]
    policy = Policy.parse(
        f"device_batch=3,num_device_batches=2,prefix_sharing={sharing},early_leaving={early}"
    )
    with Engine(llama.folder, policy, offload_dir=offload, device="cpu") as engine:
        outputs = engine.answer(requests)
        totals = engine.record().totals
    shares = [output.seconds for output in outputs]
    assert sum(shares) == pytest.approx(totals.seconds)
    assert all(0 < share <= output.block_seconds for share, output in zip(shares, outputs, strict=True))
    assert (totals.shared_tokens > 0) == (sharing == "on")


def test_a_pass_is_shared_by_the_work_of_its_tokens(llama: Family, offload: Path) -> None:
    """A long prompt takes more of a pass than a short one, and a long context more than a short one."""
    short, long = prompts((4, 40))
    with Engine(llama.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        first = engine.answer([Request(short, 1), Request(long, 1)])
        decoded = engine.answer([Request(short, 12), Request(long, 12)])
        operations = Operations.of(engine.spec)
    expected = operations.of_tokens(40, 0, 1) / operations.of_tokens(4, 0, 1)
    assert first[1].seconds / first[0].seconds == pytest.approx(expected) and expected > 5
    assert operations.of_tokens(1, 40, 1) > operations.of_tokens(1, 4, 1)
    assert first[0].seconds < decoded[0].seconds < decoded[1].seconds


def test_peaks_are_within_the_plan_while_weights_are_packed(llama: Family, offload: Path) -> None:
    """Loading counts where the run's own bytes come to lie later, tier by tier."""
    for text in ("weight_quant=4", "weights=disk,weight_quant=4", "weights=0/1/0,kv=host,weight_quant=8"):
        for device in ("cpu", "pretend"):
            policy = Policy.parse(f"{text},device_batch=4,num_device_batches=2")
            with Engine(
                llama.folder, policy, offload_dir=offload, device=device, store=offload / f"{text}-{device}"
            ) as engine:
                engine.answer(REQUESTS)
                record = engine.record()
            for tier, memory in record.memory.items():
                assert memory.peak <= memory.planned, (text, device, tier)
            assert record.together is not None and record.together.peak <= record.together.planned


def test_the_peak_of_the_process_is_that_of_the_run() -> None:
    with mmap.mmap(-1, 1 << 30) as block:  # more than what tests before it took
        block[::4096] = b"x" * (1 << 18)
        assert peak_rss() > 1 << 30
    before = peak_rss()
    forget_peak()
    assert peak_rss() <= before - (1 << 29)
