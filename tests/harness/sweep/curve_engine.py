"""Engines and points for tests of the sweep: plain `transformers` with noise in place of lost bits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from engine.errors import BudgetError, UsageError
from engine.spec.format_key import reference_of
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord, StoredRecord
from engine.spec.request import Output, Request
from engine.spec.settings import EngineSettings
from harness.sweep.formats import choose_formats
from harness.sweep.points import Divergence, EntryScore, Likelihood, Point, Speed, Storage
from tests.support.records import make_record
from tests.support.reference_engine import ReferenceEngine


class RoughEngine(ReferenceEngine):
    """Stands for an engine with compressed weights: fewer bits add more noise to the logits."""

    asked: list[tuple[str, int]] = []
    """(policy, requests) of each call, newest last, over all instances."""

    fails: str = ""
    """Name of a policy that cannot be run."""

    killed: str = ""
    """Name of a policy under which the process is interrupted."""

    def __init__(self, settings: EngineSettings, policy: Policy, say: Any = None) -> None:
        super().__init__(settings, policy, say)
        if policy.name == self.fails:
            raise UsageError("this format cannot be run here: choose another")
        quant = policy.weight_quant.default
        self.bits = quant.bits if quant else 16
        about = {"num_parameters": 16_000, "kv_widths": ((8, 8), (8, 8))}
        self.spec = SimpleNamespace(**{**vars(self.spec), **about})

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Any = None,
        on_logits: Callable[[int, int, Any], None] | None = None,
    ) -> list[Output]:
        """Answer; forced continuations one token at a time."""
        RoughEngine.asked.append((self._policy.name, len(requests)))
        if self._policy.name == self.killed:
            raise KeyboardInterrupt
        plain = [i for i, request in enumerate(requests) if not request.forced]

        def forward(index: int, output: Output) -> None:
            if on_output:
                on_output(plain[index], output)

        outputs = dict(
            zip(plain, super().answer([requests[i] for i in plain], on_output=forward), strict=True)
        )
        for index, request in enumerate(requests):
            if request.forced:
                outputs[index] = self._forced(index, request, on_logits)
        return [outputs[index] for index in range(len(requests))]

    def record(self) -> EngineRecord:
        """A record with stored bytes and the policy's block."""
        bits = self.bits + (0.5 if self.bits < 16 else 0)
        return replace(super().record(), stored=StoredRecord(int(bits * 2000), bits / 8, 64.0, 100))

    free: int = 1600
    """Bytes of host memory that a new engine finds free."""

    @property
    def limits(self) -> Mapping[Tier, int]:
        """What is free now."""
        return dict.fromkeys(Tier, self.free)

    def largest_block(
        self, prompt_tokens: int, new_tokens: int, limits: Mapping[Tier, int] | None = None
    ) -> int:
        """No block fits with 8 bits."""
        if self.bits == 8:
            raise BudgetError("host", 2, 1, "a block of one", "raise --host-memory")
        return (limits or self.limits)[Tier.HOST] // (16 * self.bits)

    def _forced(self, index: int, request: Request, on_logits: Any) -> Output:
        import torch

        self._one(Request(request.prompt, 1))  # loads the model
        with torch.inference_mode():
            ids = torch.tensor([request.prompt + request.forced[:-1]])
            logits = self._model(ids).logits[0, len(request.prompt) - 1 :].float()
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        logits = logits + noise * (0.0 if self.bits == 16 else 2.0**-self.bits)
        logprobs = []
        for i, token in enumerate(request.forced):
            if on_logits:
                on_logits(index, len(request.prompt) - 1 + i, logits[i : i + 1])
            logprobs.append(logits[i].log_softmax(-1)[token].item())
        greedy = tuple(logits.argmax(-1).eq(torch.tensor(request.forced)).tolist())
        return Output(request.forced, tuple(logprobs), None, "length", 1, 0.01, greedy=greedy)


LOSSES = {"full": 0.0, "w8": 0.0, "w4": 0.004, "w2": 0.4, "kv4": 0.002, "kv2": 0.1, "both": 0.02}
"""What a made-up format loses, as a part of what full precision has right."""

FORMATS = {
    "w8": Policy.parse("name=w8,weight_quant=8"),
    "w4": Policy.parse("name=w4,weight_quant=best4"),
    "w2": Policy.parse("name=w2,weight_quant=2"),
    "kv4": Policy.parse("name=kv4,kv_quant=flexgen"),
    "kv2": Policy.parse("name=kv2,kv_quant=2"),
    "both": Policy.parse("name=both,weight_quant=flexgen,kv_quant=flexgen"),
}


def made_up_points(instances: int = 1000) -> list[Point]:
    """Full precision, which has 9 of 10 instances right, and formats that lose some of them."""
    base = Policy(name="resident")
    rng = random.Random(0)
    right = [rng.random() < 0.9 for _ in range(instances)]
    hardness = [rng.random() for _ in range(instances)]
    nll = [rng.expovariate(2) for _ in range(50)]
    points = []
    for policy in [reference_of(base), *choose_formats([], FORMATS, base)]:
        loss = LOSSES[policy.name]
        values = {f"id{i}": float(right[i] and hardness[i] >= loss) for i in range(instances)}
        mean = sum(values.values()) / instances
        weights, kv = policy.weight_quant.default, policy.kv_quant
        points.append(Point(
            name=policy.name,
            policy=policy.to_dict(),
            asked={"model": "sha256:one", "seed": 0},
            engine=make_record(),
            created="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            storage=Storage(
                weight_bytes=int(125_000 * (weights.bits_per_value() if weights else 16)),
                parameters=1_000_000,
                kv_bytes_per_token=8.0 * (kv.keys.bits_per_value() if kv else 32),
                kv_values_per_token=64, kv_tokens=1000, largest_block=10, block_prompt=512, block_new=32,
                block_size=4,
            ),
            speed=Speed([90.0, 110.0, 100.0], 4, 512, 32),
            entries=[EntryScore("task", "exact_match", True, mean, mean - 0.02, mean + 0.02, values),
                     EntryScore("words", "bits_per_byte", False, 1.5, 1.4, 1.6, {"a": 1.5})],
            answers=Likelihood([x + loss for x in nll], [4] * 50, [True] * 50),
            text=Likelihood([64 * (math.log(3) + loss)], [64], [False]),
            last_words=Likelihood([1.0, 2.0], [1, 2], [True, False]),
            divergence=None if policy.name == "full" else Divergence(loss / 10 + 1e-6, 1 - loss, 300),
        ))  # fmt: skip
    return points
