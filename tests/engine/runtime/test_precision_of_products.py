"""Products in several precisions, against `transformers` in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.kernels.cpu import native
from engine.spec.precision import MatmulPrecision
from engine.spec.request import Request
from tests.support.agreement import Expected
from tests.support.engine_models import Family, prompts
from tests.support.engine_runs import answers

BOUNDS = {"highest": 1e-4, "high": 1e-4, "medium": 0.1}
"""Largest difference of a log-probability."""

REQUESTS = [Request(prompt, 0, prompt_logprobs=True) for prompt in prompts()]


def worst(model: Family, policy: str, offload: Path) -> float:
    """The largest difference of a prompt token's log-probability."""
    found = answers(model.folder, policy, REQUESTS, offload, "cpu")

    def distance(got: tuple[float, ...] | None, expected: Expected) -> float:
        assert got is not None
        return max((abs(a - b) for a, b in zip(got, expected.prompt_logprobs, strict=True)), default=0.0)

    return max(distance(o.prompt_logprobs, e) for o, e in zip(found, model.expected, strict=True))


@pytest.fixture(autouse=True)
def every_unit_counts_as_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make precisions count as faster on every processor that can compute them at all."""
    monkeypatch.setattr(native, "gains_by", native.has_unit)


def test_a_precision_that_gains_nothing_here_is_not_computed(
    monkeypatch: pytest.MonkeyPatch, llama: Family, offload: Path
) -> None:
    monkeypatch.setattr(native, "gains_by", lambda precision: False)
    exact, *others = (
        [
            found.prompt_logprobs
            for found in answers(
                llama.folder, f"device_batch=16,matmul_precision={precision}", REQUESTS, offload, "cpu"
            )
        ]
        for precision in BOUNDS
    )
    assert others == [exact, exact]


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_each_precision_keeps_its_distance(name: str, family: Callable[[str], Family], offload: Path) -> None:
    found = {
        precision: worst(family(name), f"device_batch=16,matmul_precision={precision}", offload)
        for precision in BOUNDS
    }
    assert all(found[precision] <= bound for precision, bound in BOUNDS.items()), found
    if native.has_unit(MatmulPrecision.MEDIUM):
        assert found["medium"] > found["high"], "bfloat16 alone is coarser"


@pytest.mark.parametrize("precision", BOUNDS)
def test_packed_weights_answer_alike_wherever_they_lie(precision: str, llama: Family, offload: Path) -> None:
    shape = f"weight_quant=4,matmul_precision={precision},device_batch=4,num_device_batches=2"
    near = answers(llama.folder, shape, REQUESTS, offload, "cpu")
    far = answers(llama.folder, f"weights=disk,kv=disk,{shape}", REQUESTS, offload, "cpu")
    for one, other in zip(near, far, strict=True):
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=BOUNDS[precision])
