"""Attention on the host beside the device: equal answers, no cache on the link, failures that are raised."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.errors import PolicyError, UsageError
from engine.kernels.cpu import native
from engine.memory.kv.host_attention import HostAttender
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import NEW_TOKENS, Family, prompts
from tests.support.engine_runs import answers, held, stream_threads

REQUESTS = [Request(prompt, NEW_TOKENS, prompt_logprobs=i % 2 == 0) for i, prompt in enumerate(prompts())]
SHAPE = "device_batch=3,num_device_batches=2"


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize(
    "name", ["llama", "opt", "gemma2", "gpt_oss", "mistral", "gpt_bigcode", "deepseek_v3", "cohere2"]
)
def test_answers_are_those_of_transformers(
    name: str, schedule: str, family: Callable[[str], Family], offload: Path
) -> None:
    """Windows, soft-capped scores, sinks, grouped and single key-value heads, narrow values."""
    for kv in ("host", "0.3/0.4/0.3"):
        policy = f"kv={kv},host_attention=on,schedule={schedule},{SHAPE}"
        outputs = answers(family(name).folder, policy, REQUESTS, offload, "pretend")
        for request, output, expected in zip(REQUESTS, outputs, family(name).expected, strict=True):
            COMPARISON.check(name, request, output, expected)


@pytest.mark.parametrize("form", ["16", "4", "3-g8", "4-channel-g8/4+4", "2-channel-g8/3-channel-g8+5"])
@pytest.mark.parametrize(("name", "fraction"), [("llama", 1.0), ("llama", 0.3), ("gpt_oss", 0.3)])
def test_on_and_off_agree(
    name: str, form: str, fraction: float, family: Callable[[str], Family], offload: Path
) -> None:
    chosen = f"kv=0/0.6/0.4,kv_quant={form},attention_fraction={fraction},{SHAPE}"
    kinds = itertools.product(("on", "off"), ("sequential", "overlapped"))
    found = [
        answers(
            family(name).folder, f"{chosen},host_attention={on},schedule={walk}", REQUESTS, offload, "pretend"
        )
        for on, walk in kinds
    ]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one.tokens == two.tokens
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


def test_without_compiled_kernels_the_answers_are_the_same(
    llama: Family, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    with Engine(llama.folder, Policy.parse("kv=host"), offload_dir=offload, device="pretend") as engine:
        assert not engine.check(REQUESTS).host_attention, "auto wants the kernels"
    outputs = answers(llama.folder, f"kv=host,host_attention=on,{SHAPE}", REQUESTS, offload, "pretend")
    for request, output, expected in zip(REQUESTS, outputs, llama.expected, strict=True):
        COMPARISON.check("llama", request, output, expected)


def test_the_cache_never_crosses_the_link(llama: Family, offload: Path) -> None:
    """A prompt's rows go to the host as they are made; nothing of the cache goes to the device."""
    plans = {}
    for switch in ("auto", "off"):
        policy = Policy.parse(f"kv=host,host_attention={switch},{SHAPE}")
        with Engine(llama.folder, policy, offload_dir=offload, device="pretend") as engine:
            plans[switch] = engine.check(REQUESTS)
            engine.answer(REQUESTS)
            streams = engine.record().streams
            row = 4 * sum(key + value for key, value in engine.spec.kv_widths)
        if switch == "auto":
            assert streams["kv_in"].bytes == 0
            assert streams["kv_out"].bytes == row * sum(len(request.prompt) for request in REQUESTS)
            assert streams["host_attention"].busy_seconds > 0
        else:
            assert streams["kv_in"].bytes > 0 and "host_attention" not in streams
    assert plans["auto"].host_attention and not plans["off"].host_attention


def test_buffers_have_no_room_for_what_stays(llama: Family, offload: Path) -> None:
    sizes = {}
    for switch in ("on", "off"):
        policy = Policy.parse(f"kv=host,host_attention={switch},device_batch=8,num_device_batches=1")
        policy = policy.replace(max_batch_tokens=16)
        with Engine(llama.folder, policy, offload_dir=offload, device="pretend") as engine:
            sizes[switch] = engine.check([Request((5,) * 10, 90)] * 8).kv_buffer
    assert sizes["on"] < 0.3 * sizes["off"]


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize("calls", [0, 5])
def test_a_failure_on_the_host_comes_out(
    calls: int, schedule: str, llama: Family, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count()
    real = HostAttender._attend

    def fails(self: HostAttender, *args: Any) -> None:
        if next(count) >= calls:
            raise ZeroDivisionError("broken")
        real(self, *args)

    policy = Policy.parse(f"kv=host,host_attention=on,schedule={schedule},{SHAPE}")
    with Engine(llama.folder, policy, offload_dir=offload, device="pretend") as engine:
        engine.answer(REQUESTS[:1])
        before = held(engine)
        with monkeypatch.context() as patch:
            patch.setattr(HostAttender, "_attend", fails)
            with pytest.raises(ZeroDivisionError, match="broken"):
                engine.answer(REQUESTS)
        assert stream_threads() == [] and held(engine) == before
        for request, output, expected in zip(REQUESTS, engine.answer(REQUESTS), llama.expected, strict=True):
            COMPARISON.check("llama", request, output, expected)


def test_where_it_has_no_meaning_it_is_refused(llama: Family, offload: Path) -> None:
    with pytest.raises(PolicyError, match="kv=1/0/0 places none there"):
        Policy.parse("host_attention=on")
    with pytest.raises(PolicyError, match="places none there"):
        Policy.parse("host_attention=on,kv=0.5/0/0.5")
    with pytest.raises(UsageError, match="no meaning on a CPU-only machine") as caught:
        Engine(llama.folder, Policy.parse("kv=host,host_attention=on"), offload_dir=offload, device="cpu")
    assert "\n" not in str(caught.value)
    for switch in ("auto", "off"):
        policy = Policy.parse(f"kv=host,host_attention={switch}")
        with Engine(llama.folder, policy, offload_dir=offload, device="cpu") as engine:
            assert not engine.check(REQUESTS).host_attention


def test_auto_leaves_to_the_device_what_the_kernels_would_have_to_convert(
    llama: Family, offload: Path
) -> None:
    with Engine(llama.folder, Policy.parse("kv=host"), offload_dir=offload, device="pretend") as engine:
        assert engine._attends_on_host(engine.policy)
        engine._compute_dtype = torch.float16
        assert not engine._attends_on_host(engine.policy)
        assert engine._attends_on_host(Policy.parse("kv=host,kv_quant=4"))
        assert engine._attends_on_host(Policy.parse("kv=host,host_attention=on"))
