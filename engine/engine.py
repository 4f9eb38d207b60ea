"""The one door of the engine: requests in, answers out, within the budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from engine.batching import Block, check_request, need_of
from engine.executor import Executor
from engine.machine import capacities, hardware, peak_rss, pick_device, software
from engine.memory.hidden import HiddenStore
from engine.memory.kv_cache import KVCache
from engine.memory.storage import Tiers, check_offload_dir
from engine.memory.weights import WeightStore
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint, RandomWeights, load_config, resolve
from engine.models.describe import describe
from engine.models.twin import check_architecture
from engine.plan.memory import MemoryPlan, limits_of, plan_memory
from engine.plan.placement import achieved
from engine.sampling import finish_reason
from engine.spec.hardware import Budgets, Tier
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.request import Output, Progress, Request
from engine.trace import Trace

OnOutput = Callable[[int, Output], None]
OnProgress = Callable[[Progress], None]


class Engine:
    """A model run by a policy within budgets.

    The constructor reads config and headers only; weights are brought in by the first `answer`.
    Use it as a context manager, so that files of the disk tier are deleted.

    Attributes:
        spec: the model as data.
        policy: how it is run.
        trace: what every lane did.
    """

    def __init__(
        self,
        model: str | Path,
        policy: Policy | None = None,
        *,
        budgets: Budgets | None = None,
        offload_dir: Path | None = None,
        device: str = "auto",
        weights: Literal["trained", "random"] = "trained",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        """Prepare to run ``model`` (a local folder or a hub name).

        Args:
            budgets: most bytes per tier; what is not given is all that is free.
            offload_dir: folder of the disk tier; ``results/offload`` by default.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``pretend``.
            weights: ``random`` needs only a config and is meant for speed, not for answers.
            seed: of random weights.
            trust_remote_code: run the code that a checkpoint carries.

        Raises:
            UsageError: for a model, device or folder that cannot be used.
        """
        self.policy = policy or Policy()
        self.trace = Trace()
        budgets = budgets or Budgets()
        self._device, self._unified = pick_device(device, budgets)
        offload = offload_dir or Path("results/offload")
        if any(placement.disk for placement in (self.policy.weights, self.policy.kv, self.policy.activations)):
            check_offload_dir(offload)
        folder = resolve(str(model))
        config = load_config(str(model), folder, trust_remote_code)
        self._source = RandomWeights(config, seed) if weights == "random" else Checkpoint(folder)
        check_architecture(config)
        self._model = self._build(config, trust_remote_code)
        self.spec: ModelSpec = describe(
            config, self._model, self._source.dtypes(self._model), self._compute_dtype,
            self._source.digest, self._source.kind, str(model),
        )  # fmt: skip
        self._limits = limits_of(budgets, capacities(self._device, offload))
        self._budgets = budgets
        self._tiers = Tiers(self._device, self._unified, self._limits, offload)
        self._weights: WeightStore | None = None
        self._plan: MemoryPlan | None = None
        self._kv_placed = dict.fromkeys(Tier, 0)
        self._totals = {"requests": 0, "passes": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._seconds = self._load_seconds = 0.0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the weights and delete everything on the disk tier."""
        self._weights = None
        self._tiers.close()

    def check(self, requests: Sequence[Request]) -> MemoryPlan:
        """Find out, before anything is loaded, whether these requests can be answered within the budgets.

        Raises:
            RequestError: if the model cannot take a request.
            BudgetError: if a tier would have to hold more than its budget.
        """
        for index, request in enumerate(requests):
            check_request(index, request, self.spec)
        plan = plan_memory(self.spec, self.policy, [need_of(request) for request in requests], self._unified)
        plan.check(self._limits)
        return plan

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Output]:  # fmt: skip
        """Complete prompts of token ids; shorthand for `answer`. Prompt i samples with seed + i."""
        ends = frozenset(stop_token_ids)
        return self.answer(
            [
                Request(tuple(prompt), max_new_tokens, temperature=temperature, seed=seed + i, stop_token_ids=ends)
                for i, prompt in enumerate(prompts)
            ]
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """log p(token i | tokens before it) for i = 1 .. n-1 of each sequence; shorthand for `answer`."""
        outputs = self.answer([Request(tuple(ids), prompt_logprobs=True) for ids in sequences])
        return [output.prompt_logprobs or () for output in outputs]

    def answer(
        self, requests: Sequence[Request], on_output: OnOutput | None = None, on_progress: OnProgress | None = None
    ) -> list[Output]:
        """Answer all requests, generation and scoring mixed, in their order.

        Args:
            on_output: called with (index, output) as soon as a request is finished, in this thread.
            on_progress: called after every pass.

        Raises:
            RequestError, BudgetError: before anything is loaded; see `check`.
            StorageError: if a tier fails in the middle; outputs already handed to ``on_output`` stand.
        """
        if not requests:
            return []
        self._plan = plan = self.check(requests)
        self._load(plan)
        outputs: list[Output | None] = [None] * len(requests)
        run = _Run(self, plan, requests, outputs, on_output, on_progress)
        try:
            run.passes()
        finally:
            self._seconds += run.seconds
            for key, count in run.totals.items():
                self._totals[key] += count
            run.close()
        return [output for output in outputs if output is not None]

    def record(self) -> dict[str, Any]:
        """Everything a result has to say about how it came about; JSON-able."""
        plan, spec = self._plan, self.spec
        sizes = {name: tensor.numel for name, tensor in spec.tensors.items()}
        placement = {}
        if plan is not None:
            held = sum(self._kv_placed.values())
            placement = {
                "weights": achieved(sizes, plan.weights),
                "kv": {tier.value: count / held for tier, count in self._kv_placed.items()}
                if held
                else achieved([1] * len(plan.kv_seats), plan.kv_seats),
                "activations": achieved([1] * len(plan.activation_seats), plan.activation_seats),
            }
        return {
            "kind": "measured",
            "model": {
                "path": spec.path, "architecture": spec.architecture, "digest": spec.digest, "weights": spec.weights,
                "num_parameters": spec.num_parameters, "dtype": spec.dtype, "compute_dtype": spec.compute_dtype,
            },
            "policy": self.policy.to_dict(),
            "placement": placement,
            "memory": {
                tier.value: {
                    "budget": self._budgets.of(tier),
                    "planned": plan.total(tier) if plan else 0,
                    "peak": self._tiers.ledger.peak[tier],
                }
                for tier in Tier
            },
            "process": {"peak_rss": peak_rss(), "device_peak": self._device_peak()},
            "totals": {**self._totals, "seconds": self._seconds, "load_seconds": self._load_seconds},
            "lanes": self.trace.summary(self._seconds),
            "hardware": hardware(self._device, pretend=not self._unified and self._device.type == "cpu"),
            "software": software(),
        }  # fmt: skip

    def _device_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def _build(self, config: Any, trust_remote_code: bool) -> LayeredModel:
        """The empty model, in the precision that is fastest here without loss: float32 on a CPU."""
        self._compute_dtype = torch.float32
        if self._device.type == "cuda":
            kept = getattr(config, "dtype", None)
            self._compute_dtype = kept if kept in (torch.float16, torch.bfloat16) else torch.float32
        return LayeredModel.empty(config, self._compute_dtype, trust_remote_code).to(self._device)

    def _load(self, plan: MemoryPlan) -> None:
        if self._weights is not None:
            return
        begin = time.perf_counter()
        ledger, loading = self._tiers.ledger, plan.tiers[Tier.HOST]["loading"]
        ledger.charge(Tier.HOST, loading, "loading")
        try:
            with torch.inference_mode():
                store = WeightStore(self.spec, self.policy, plan, self._tiers)
                store.fill(self._source.stream(self._model))
        finally:
            ledger.release(Tier.HOST, loading)
        self._weights = store
        self._load_seconds += time.perf_counter() - begin


class _Run:
    """One call of `Engine.answer`: seats, passes, outputs."""

    def __init__(
        self, engine: Engine, plan: MemoryPlan, requests: Sequence[Request], outputs: list[Output | None],
        on_output: OnOutput | None, on_progress: OnProgress | None,
    ) -> None:  # fmt: skip
        assert engine._weights is not None
        self._engine, self._plan, self._outputs = engine, plan, outputs
        self._on_output, self._on_progress = on_output, on_progress
        self._tiers = engine._tiers
        self._workspace = sum(plan.tiers[Tier.DEVICE].get(use, 0) for use in ("workspace", "activations"))
        self._tiers.ledger.charge(Tier.DEVICE, self._workspace, "workspace")
        self._kv_cache = KVCache(engine.spec, engine.policy, plan, self._tiers)
        self._hidden = HiddenStore(engine.spec, plan, self._tiers, engine.policy.num_device_batches)
        self._executor = Executor(
            engine.spec, engine.policy, engine._model, engine._weights, self._kv_cache, self._hidden, self._tiers,
            engine.trace,
        )  # fmt: skip
        self._block = Block(requests, engine.policy)
        self._work_left = self._work = sum(need_of(r).fed + r.max_new_tokens for r in requests)
        self.totals = {"requests": 0, "passes": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self.seconds = 0.0

    def passes(self) -> None:
        """Run until every request is answered."""
        began = time.perf_counter()
        while True:
            self._block.refill(self._admit)
            batches = [batch for batch in self._block.batches if batch]
            if not batches:
                return
            active = self._block.active
            before = time.perf_counter()
            self._executor.run_pass([list(batch) for batch in batches], more=self._expects_more(active))
            now = time.perf_counter()
            self.totals["passes"] += 1
            for sequence in active:
                self._after_pass(sequence, len(active), now - before)
            self.seconds = time.perf_counter() - began
            self._report()

    def close(self) -> None:
        """Stop the lanes and give all memory back."""
        self._executor.close()
        for sequence in self._block.active:
            if sequence.region is not None:
                self._kv_cache.free(sequence.region)
        for tier, count in self._kv_cache.placed.items():
            self._engine._kv_placed[tier] += count
        self._kv_cache.close()
        self._hidden.close()
        self._tiers.ledger.release(Tier.DEVICE, self._workspace)

    def _admit(self, seat: int, request: Request) -> Any:
        return self._kv_cache.allocate(self._plan.kv_seats[seat], need_of(request).cached)

    def _expects_more(self, active: Sequence[Any]) -> bool:
        if self._block.waiting:
            return True
        return any(len(sequence.tokens) + 1 < sequence.request.max_new_tokens for sequence in active)

    def _after_pass(self, sequence: Any, block_size: int, seconds: float) -> None:
        request = sequence.request
        sequence.passes += 1
        sequence.block_sizes += block_size
        sequence.block_seconds += seconds
        if len(sequence.fresh) == sequence.done:  # its first pass
            self.totals["prompt_tokens"] += sequence.done
            self._work_left -= sequence.done
        if request.max_new_tokens:
            self.totals["generated_tokens"] += 1
            self._work_left -= 1
        reason = finish_reason(request, sequence.tokens)
        if reason is None:
            sequence.fresh = [sequence.tokens[-1]]
            return
        self._work_left -= request.max_new_tokens - len(sequence.tokens)
        if sequence.region is not None:
            self._kv_cache.free(sequence.region)
        self._block.leave(sequence)
        self.totals["requests"] += 1
        output = sequence.output(reason)
        self._outputs[sequence.index] = output
        if self._on_output is not None:
            self._on_output(sequence.index, output)

    def _report(self) -> None:
        if self._on_progress is None:
            return
        done = self._work - self._work_left
        self._on_progress(
            Progress(
                finished=self.totals["requests"], total=len(self._outputs), passes=self.totals["passes"],
                generated_tokens=self.totals["generated_tokens"], prompt_tokens=self.totals["prompt_tokens"],
                seconds=self.seconds, eta_seconds=self.seconds * self._work_left / max(done, 1),
            )
        )  # fmt: skip
