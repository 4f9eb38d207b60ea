"""With a GPTQ or AWQ checkpoint the engine answers as `transformers` with the defined values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.spec.request import Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import NEW_TOKENS, Family, full_forwards, prompts
from tests.support.engine_runs import answers
from tests.support.prequantised_models import AWQ, GPTQ, save_quantised

REQUESTS = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()[:4]]


@pytest.mark.parametrize("settings", [
    GPTQ,
    GPTQ | {"bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"},
    GPTQ | {"bits": 2, "group_size": -1},
    AWQ,
])  # fmt: skip
@pytest.mark.parametrize("name", ["opt", "llama", "mistral", "gpt2"])
def test_answers_are_those_of_the_definition(
    name: str, settings: dict[str, Any], family: Callable[[str], Family], tmp_path: Path, offload: Path
) -> None:
    model = copy.deepcopy(family(name).model)
    meanings = save_quantised(model, tmp_path / "model", settings)
    model.load_state_dict(meanings, strict=False)
    expected = [full_forwards(model, request.prompt, NEW_TOKENS) for request in REQUESTS]
    for policy in ("weights=device", "weights=0.3/0.3/0.4,weight_quant=8"):
        outputs = answers(tmp_path / "model", policy, REQUESTS, offload)
        for request, output, wanted in zip(REQUESTS, outputs, expected, strict=True):
            COMPARISON.check(f"{name} ({settings['quant_method']})", request, output, wanted)


def test_packed_weights_stay_as_small_as_they_came(llama: Family, tmp_path: Path, offload: Path) -> None:
    save_quantised(llama.model, tmp_path / "model", GPTQ)
    with Engine(tmp_path / "model", offload_dir=offload, device="cpu") as engine:
        packed = [tensor for tensor in engine.spec.tensors.values() if tensor.packed is not None]
        assert len(packed) == 2 * 7
        engine.answer(REQUESTS[:1])
        for tensor in packed:
            assert engine._weights is not None
            data = engine._weights._stored[tensor.name].data
            assert data is not None and data.numel() == tensor.packed.nbytes(*tensor.matrix)
            assert (
                data.numel() == tensor.numel * 5 // 8
            )  # 4 bits per number, and 32 more for every 32 numbers
