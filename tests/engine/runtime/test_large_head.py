"""A head as large as two layers, outside the device: loaded once for all passes, into a buffer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import OPTConfig

from engine.engine import Engine
from engine.errors import StorageError
from engine.plan.memory import SequenceNeed, plan_memory
from engine.plan.paper.named import spec_of_opt
from engine.spec.layout import LAST_STAGE_BUFFER, STAGE_BUFFERS
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from tests.support.engine_models import prompts, tiny_model
from tests.support.engine_runs import answers

LAYERS = 3
REQUESTS = [Request(prompt, 5, prompt_logprobs=True) for prompt in prompts((9, 4, 17, 1))]


def config(vocabulary: int) -> OPTConfig:
    """Layers of about 13,000 values, and ``vocabulary`` times 32 in the tied table."""
    return OPTConfig(
        vocab_size=vocabulary, hidden_size=32, word_embed_proj_dim=32, ffn_dim=128, num_attention_heads=4,
        num_hidden_layers=LAYERS, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head is larger than two layers, whose small tensors all begin at a page."""
    folder = tmp_path_factory.mktemp("large-head")
    tiny_model(config(6000)).save_pretrained(folder)
    return folder


@dataclass
class Ran:
    """What a run answered, what it planned, and how often it loaded the head and a layer."""

    outputs: list[Output]
    plan: MemoryPlan
    heads_loaded: int
    layers_loaded: int


def run(model: Path, policy: str, offload: Path, device: str, runs: int = 1) -> Ran:
    with Engine(model, Policy.parse(policy), offload_dir=offload, device=device) as engine:
        for _ in range(runs):
            outputs = engine.answer(REQUESTS)
        spans = [span for span in engine.trace.spans if span.stream == "weights" and span.bytes]
        plan = engine.check(REQUESTS)
    names = [span.what for span in spans]
    return Ran(outputs, plan, names.count(f"load weights {LAYERS + 1}.0"), names.count("load weights 2.0"))


@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize("schedule", ["overlapped", "sequential"])
@pytest.mark.parametrize("weights", ["weights=disk", "weights=disk,weight_quant=4", "weights=0/0/1,kv=disk"])
def test_one_pass_brings_it_for_all(
    model: Path, weights: str, schedule: str, device: str, offload: Path
) -> None:
    shape = f"device_batch=2,num_device_batches=2,schedule={schedule}"
    found = run(model, f"{weights},{shape}", offload, device, runs=2)
    assert found.plan.head_stays and found.heads_loaded == 1 and found.layers_loaded > 4
    near = answers(model, f"{weights.replace('weights=disk', 'weights=device')},{shape}", REQUESTS, offload)
    for one, other in zip(found.outputs, near, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def planned(vocabulary: int, policy: str) -> MemoryPlan:
    spec: ModelSpec = spec_of_opt(
        config(vocabulary).to_dict() | {"torch_dtype": "float32"}, "test", "float32"
    )
    return plan_memory(spec, Policy.parse(policy), [SequenceNeed(8, 12)], unified=True, computes_packed=True)


@pytest.mark.parametrize("policy", ["weights=disk", "weights=disk,weight_quant=4", "weights=0/0.5/0.5"])
def test_it_takes_no_more_memory_than_two_buffers_of_its_size(policy: str) -> None:
    for vocabulary in (100, 1000, 2000, 3000, 4000, 9000):
        plan = planned(vocabulary, policy)
        head = plan.weights["model.decoder.embed_tokens.weight"]
        own = plan.stage_buffers[LAST_STAGE_BUFFER]
        assert bool(own) is plan.head_stays
        layers = plan.stage_buffers[0]
        if plan.head_stays:
            assert (
                head.raw_bytes + head.exact_bytes <= own
                and STAGE_BUFFERS * layers + own <= STAGE_BUFFERS * own
            )
        elif head.brought(LAYERS + 1):
            assert head.raw_bytes + head.exact_bytes <= layers
    assert not planned(100, policy).head_stays


def test_a_head_that_could_not_be_read_is_asked_for_again(
    model: Path, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that was not loaded completely is loaded again."""
    with Engine(model, Policy.parse("weights=disk"), offload_dir=offload, device="cpu") as engine:
        before = engine.answer(REQUESTS[:1])
        store = engine._weights
        assert store is not None
        store._head_is_there = False
        load = store._load_runs

        def fail(*arguments: object) -> int:
            raise StorageError("broken")

        monkeypatch.setattr(store, "_load_runs", fail)
        with pytest.raises(StorageError, match="broken"):
            engine.answer(REQUESTS[:1])
        assert not store._head_is_there
        monkeypatch.setattr(store, "_load_runs", load)
        assert engine.answer(REQUESTS[:1])[0].logprobs == before[0].logprobs
