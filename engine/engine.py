"""The one door of the engine: requests in, answers out, within the budgets."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from engine.batching import check_request, need_of
from engine.errors import StorageError
from engine.executor import Runtime
from engine.machine import capacities, hardware, peak_rss, pick_device, software
from engine.memory.storage import Tiers, check_offload_dir
from engine.memory.weights import WeightStore
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint, RandomWeights, load_config, resolve
from engine.models.describe import describe
from engine.models.twin import check_architecture
from engine.plan.memory import check_plan, limits_of, plan_memory
from engine.plan.placement import achieved
from engine.run import OnOutput, OnProgress, Run
from engine.spec.hardware import Budgets, Tier
from engine.spec.layout import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.request import Output, Progress, Request
from engine.trace import Trace


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
        if any(
            placement.disk for placement in (self.policy.weights, self.policy.kv, self.policy.activations)
        ):
            check_offload_dir(offload)
        folder = resolve(str(model))
        config = load_config(str(model), folder, trust_remote_code)
        self._source = RandomWeights(config, seed) if weights == "random" else Checkpoint(folder)
        check_architecture(config)
        self._model = self._build(config, trust_remote_code)
        if not self._source.ties_hold(self._model):  # transformers does not tie what a checkpoint keeps apart
            config.tie_word_embeddings = False
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
        self._kv_placed: Counter[Tier] = Counter()
        self._totals: Counter[str] = Counter(requests=0, passes=0, prompt_tokens=0, generated_tokens=0)
        self._seconds = self._load_seconds = 0.0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the weights and delete everything on the disk tier."""
        self._weights = None
        self._tiers.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what comes after this engine finds the memory free

    def check(self, requests: Sequence[Request]) -> MemoryPlan:
        """Find out, before anything is loaded, whether these requests can be answered within the budgets.

        Raises:
            RequestError: if the model cannot take a request.
            BudgetError: if a tier would have to hold more than its budget.
        """
        for index, request in enumerate(requests):
            check_request(index, request, self.spec)
        plan = plan_memory(self.spec, self.policy, [need_of(request) for request in requests], self._unified)
        check_plan(plan, self._limits)
        return plan

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Output]:
        """Complete prompts of token ids; shorthand for `answer`. Prompt i samples with seed + i."""
        ends = frozenset(stop_token_ids)
        return self.answer(
            [
                Request(
                    tuple(prompt), max_new_tokens, temperature=temperature, seed=seed + i, stop_token_ids=ends
                )
                for i, prompt in enumerate(prompts)
            ]
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """log p(token i | tokens before it) for i = 1 .. n-1 of each sequence; shorthand for `answer`."""
        outputs = self.answer([Request(tuple(ids), prompt_logprobs=True) for ids in sequences])
        return [output.prompt_logprobs or () for output in outputs]

    def answer(
        self,
        requests: Sequence[Request],
        on_output: OnOutput | None = None,
        on_progress: OnProgress | None = None,
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
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        runtime = self._runtime(plan, on_progress, len(requests))
        mark = self._tiers.mark()
        run = None
        try:
            run = Run(runtime, plan, requests, on_output, on_progress)
            run.answer_all()
        except torch.OutOfMemoryError as error:
            raise StorageError(
                f"the device ran out of memory while computing: lower --device-memory, device_batch or "
                f"max_batch_tokens of policy {self.policy.name}"
            ) from error
        finally:
            if run is not None:
                self._seconds += run.seconds
                self._totals.update(run.totals)
                self._kv_placed.update(run.kv_placed)
                run.close()
            self._tiers.release_since(mark)
        return [output for output in run.outputs if output is not None]

    def record(self) -> dict[str, Any]:
        """Everything a result has to say about how it came about; JSON-able."""
        plan, spec = self._plan, self.spec
        sizes = {name: tensor.numel for name, tensor in spec.tensors.items()}
        placement = {}
        if plan is not None:
            held = sum(self._kv_placed.values())
            placement = {
                "weights": achieved(sizes, plan.weights),
                "kv": {tier.value: self._kv_placed[tier] / held for tier in Tier}
                if held
                else achieved([1] * len(plan.kv_seats), plan.kv_seats),
                "activations": achieved([1] * len(plan.activation_seats), plan.activation_seats),
            }
        return {
            "kind": "measured",
            "model": {
                "path": spec.path,
                "architecture": spec.architecture,
                "digest": spec.digest,
                "weights": spec.weights,
                "num_parameters": spec.num_parameters,
                "dtype": spec.dtype,
                "compute_dtype": spec.compute_dtype,
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
        }

    def _device_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def _build(self, config: Any, trust_remote_code: bool) -> LayeredModel:
        """The empty model, in the precision that is fastest here without loss: float32 on a CPU."""
        self._compute_dtype = torch.float32
        if self._device.type == "cuda":
            kept = getattr(config, "dtype", None)
            self._compute_dtype = kept if kept in (torch.float16, torch.bfloat16) else torch.float32
        return LayeredModel.empty(config, self._compute_dtype, trust_remote_code).to(self._device)

    def _runtime(self, plan: MemoryPlan, on_progress: OnProgress | None, requests: int) -> Runtime:
        """The model with its weights, brought in on the first call."""
        if self._weights is None:
            begin = time.perf_counter()
            ledger, mark = self._tiers.ledger, self._tiers.mark()
            ledger.charge(Tier.HOST, plan.loading, "loading")
            try:
                store = WeightStore(self.spec, self.policy, plan, self._tiers)
                with torch.inference_mode():
                    store.fill(self._reported(begin, on_progress, requests))
            except BaseException:
                self._tiers.release_since(mark)
                raise
            finally:
                ledger.release(Tier.HOST, plan.loading)
            self._weights = store
            self._load_seconds += time.perf_counter() - begin
        return Runtime(self.spec, self.policy, self._model, self._weights, self._tiers, self.trace)

    def _reported(
        self, begin: float, on_progress: OnProgress | None, requests: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, with word of how far reading has come about once a second."""
        total, done, last = self.spec.num_parameters, 0, begin
        for name, tensor in self._source.stream(self._model):
            yield name, tensor
            done += tensor.numel()
            now = time.perf_counter()
            if on_progress is not None and now - last > 1:
                last = now
                left = (now - begin) * (total - done) / max(done, 1)
                on_progress(Progress(0, requests, 0, 0, 0, now - begin, left, loaded=done / total))
