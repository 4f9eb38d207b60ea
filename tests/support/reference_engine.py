"""An engine that is plain `transformers`, one request at a time: the slow, simple oracle of suites in tests.

It has the interface of `engine.engine.Engine` as far as a suite uses it, and ignores placement and
compression.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.errors import CheckpointError, RequestError
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord, ModelRecord, TotalsRecord
from engine.spec.request import CallProgress, FinishReason, Output, Request
from engine.spec.settings import EngineSettings
from tests.support.records import make_record


class ReferencePlan:
    """A memory plan with nothing in it, as nothing is placed."""

    def __init__(self) -> None:
        self.tiers: dict[Tier, dict[str, int]] = {tier: {} for tier in Tier}

    def total(self, tier: Tier) -> int:
        """Peak bytes in one tier."""
        return sum(self.tiers[tier].values())


class ReferenceTrace:
    """An empty trace, so that a suite can write one."""

    def write_chrome(self, path: Path) -> None:
        """Write an empty trace."""
        path.write_text(json.dumps({"traceEvents": []}), encoding="utf-8")


class ReferenceEngine:
    """Answers requests with `transformers` alone, in float32 on the CPU.

    Attributes:
        calls: requests of each call to `answer`, newest last, over all instances.
    """

    calls: list[int] = []

    def __init__(
        self,
        settings: EngineSettings,
        policy: Policy,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        folder = Path(settings.model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no config.json: give the folder of a model")
        config = json.loads((folder / "config.json").read_text())
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        self.spec = SimpleNamespace(
            architecture=config["architectures"][0],
            max_positions=config.get("max_position_embeddings") or config["n_positions"],
            vocab_size=config["vocab_size"],
            num_parameters=0,
            digest=f"sha256:{digest}",
        )
        self.trace = ReferenceTrace()
        self._folder, self._policy, self._model = folder, policy, None
        self._totals = {"requests": 0, "passes": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._seconds = 0.0

    def check(self, requests: Sequence[Request]) -> ReferencePlan:
        """Refuse a request that does not fit the context window."""
        for request in requests:
            needed = len(request.prompt) + max(request.max_new_tokens - 1, -1)
            if needed > self.spec.max_positions:
                raise RequestError(
                    f"{needed} positions are more than the window of {self.spec.max_positions}"
                )
        return ReferencePlan()

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[CallProgress], None] | None = None,
    ) -> list[Output]:
        """Answer one request after the other."""
        self.check(requests)
        self.calls.append(len(requests))
        outputs: list[Output] = []
        for index, request in enumerate(requests):
            output = self._one(request)
            outputs.append(output)
            self._totals["requests"] += 1
            self._totals["passes"] += max(1, len(output.tokens))
            self._totals["prompt_tokens"] += len(request.prompt)
            self._totals["generated_tokens"] += len(output.tokens)
            self._seconds += output.block_seconds
            if on_output:
                on_output(index, output)
            if on_progress:
                done = index + 1
                eta = self._seconds / done * (len(requests) - done)
                counts = (
                    self._totals["passes"],
                    self._totals["generated_tokens"],
                    self._totals["prompt_tokens"],
                )
                on_progress(CallProgress(done, len(requests), *counts, self._seconds, eta))
        return outputs

    def record(self) -> EngineRecord:
        """What was done, in the engine's format, with nothing placed anywhere."""
        spec = self.spec
        return make_record(
            model=ModelRecord(
                str(self._folder), spec.architecture, spec.digest, "trained", spec.num_parameters, "float32",
                "float32",
            ),
            policy=self._policy.to_dict(),
            totals=TotalsRecord(**self._totals, seconds=self._seconds, load_seconds=0.0),
        )  # fmt: skip

    def close(self) -> None:
        """Forget the weights."""
        self._model = None

    def _one(self, request: Request) -> Output:
        import torch

        began = time.perf_counter()
        if self._model is None:
            from transformers import AutoModelForCausalLM

            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(request.seed)
        ids, generated, logprobs = list(request.prompt), [], []
        prompt_logprobs: tuple[float, ...] | None = None
        reason: FinishReason = "length"
        with torch.inference_mode():
            computed = ids if request.max_new_tokens else ids[:-1]
            logits = self._model(torch.tensor([computed])).logits[0].float()
            if request.prompt_logprobs:
                table = logits.log_softmax(-1)
                prompt_logprobs = tuple(table[i, token].item() for i, token in enumerate(ids[1:]))
            while len(generated) < request.max_new_tokens:
                token = _choose(logits[-1], request, generator)
                generated.append(token)
                logprobs.append(logits[-1].log_softmax(-1)[token].item())
                if token in request.stop_token_ids:
                    reason = "eos"
                    break
                if request.stop is not None and request.stop(generated):
                    reason = "stop"
                    break
                if len(generated) < request.max_new_tokens:
                    logits = self._model(torch.tensor([ids + generated])).logits[0].float()
        seconds = time.perf_counter() - began
        return Output(tuple(generated), tuple(logprobs), prompt_logprobs, reason, 1, seconds)


def _choose(logits: Any, request: Request, generator: Any) -> int:
    """The next id: the most probable one, or sampled with temperature, top-k and top-p."""
    import torch

    if request.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / request.temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = probabilities[order]
    cut = len(kept) if request.top_k == 0 else request.top_k
    kept = kept[:cut] * (kept[:cut].cumsum(0) - kept[:cut] < request.top_p)
    return int(order[torch.multinomial(kept / kept.sum(), 1, generator=generator)])
