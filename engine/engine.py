"""The engine: requests in, answers out, within the budgets."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import StorageError, UsageError
from engine.kernels.backend import kernels_for, precision_of, prepare
from engine.kernels.cpu import native
from engine.limits import memory_errors
from engine.machine import forget_peak, hardware, peak_rss, pick_device, software, tier_limits
from engine.memory.allocator import give_back, keep_freed_memory
from engine.memory.storage import Tiers, check_offload_dir
from engine.memory.store.packed import OnNotice, PackedStore
from engine.memory.weights.placed import WeightStore
from engine.memory.weights.smoothing import read_statistics, write_statistics
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint, RandomWeights, load_config, resolve
from engine.models.decoder.left_out import notice_of
from engine.models.decoder.ways import Way
from engine.models.describe import Origin, describe
from engine.models.digests import KeptDigests
from engine.models.linear import observing
from engine.models.twin import check_architecture
from engine.plan.memory import PROCESS, SequenceNeed, check_plan, most_that_fit, plan_memory
from engine.plan.suited import suited_policy
from engine.plan.workload import RequestShape, Workload
from engine.runtime.executor import OnLogits, Runtime
from engine.runtime.loading import Loader, LoadProgress, Sources, in_own_files, observed
from engine.runtime.record import memory_of, model_of, placement_of, savings_of, stored_of
from engine.runtime.run import Run
from engine.spec.extent import Extent
from engine.spec.hardware import Tier
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import MOST_SEQUENCES, HostAttention, Policy, PrefixSharing
from engine.spec.record import EngineRecord, MachineRecord, ProcessRecord, TogetherRecord, TotalsRecord
from engine.spec.request import OnOutput, OnProgress, Output, Request, check_request
from engine.spec.settings import EngineSettings
from engine.trace import Trace


class Engine:
    """A model run by a policy within budgets.

    The constructor reads config and headers only; weights are loaded by the first `answer`.
    Use it as a context manager, so that files of the disk tier are deleted.

    Attributes:
        settings: model, device, budgets and folders.
        spec: the model as data.
        policy: how it is run.
        trace: what every stream did.
        limits: most bytes of each tier.
    """

    def __init__(
        self,
        model: str | Path | EngineSettings,
        policy: Policy | None = None,
        on_notice: OnNotice | None = None,
        **settings: Any,
    ) -> None:
        """Prepare to run a model: ``Engine(settings, policy)`` or ``Engine("path", policy, device="cpu")``.

        Args:
            model: its settings, or its local folder or hub name.
            policy: how it is run; everything on the device if None.
            on_notice: called with one line when there is something to wait for.
            settings: fields of `EngineSettings`.

        Raises:
            UsageError: for a model, device or folder that cannot be used.
            TypeError: for a keyword that is not a setting.
        """
        self.settings = EngineSettings.of(model, settings)
        self.policy = policy or Policy()
        self.trace = Trace()
        self._on_notice = on_notice
        self._device, self._unified = pick_device(self.settings.device, self.settings.budgets)
        self._check_policy()
        own_files = self._describe_model()
        self.policy = suited_policy(self.policy, self.spec)
        prepare(self._device)  # before what is free is looked at: its matrices are nobody's plan
        self.limits = self._look()
        self._tiers = Tiers(self._device, self._unified, self.limits, self.settings.offload_dir)
        statistics = self.policy.calibration
        self._smoothing = read_statistics(Path(statistics), self.spec.digest) if statistics else {}
        self._loader = Loader(
            self._source, own_files, self._model, self.spec, self.policy, PackedStore(self.settings.store),
            self._smoothing, self.settings.verify,
        )  # fmt: skip
        self._weights: WeightStore | None = None
        self._sources: Sources | None = None
        self._cached = 0
        self._plan: MemoryPlan | None = None
        self._placed: Counter[tuple[str, Tier]] = Counter()
        self._totals: Counter[str] = Counter(requests=0, passes=0, prompt_tokens=0, generated_tokens=0)
        self._seconds = self._load_seconds = 0.0

    def _look(self) -> dict[Tier, int]:
        """Most bytes of each tier, by the budgets and by what is free now."""
        limits, self._host_limit = tier_limits(self.settings, self._device, self._on_notice)
        return limits

    def _check_policy(self) -> None:
        """Refuse what the device or the folder of the disk tier cannot do."""
        policy = self.policy
        if self._unified and policy.host_attention is HostAttention.ON:
            raise UsageError(
                "host_attention=on has no meaning on a CPU-only machine, where attention is on the host "
                "already: use auto, or --device pretend to keep device and host apart"
            )
        if any(placement.disk for placement in (policy.weights, policy.kv, policy.state, policy.activations)):
            check_offload_dir(self.settings.offload_dir)

    def _describe_model(self) -> dict[str, Extent]:
        """Make the empty model and its spec; returns where its files hold weights as the model takes them."""
        settings = self.settings
        folder = resolve(settings.model)
        config = load_config(settings.model, folder, settings.trust_remote_code)
        is_random = settings.weights == "random"
        kept = KeptDigests(PackedStore(settings.store).digests, trusted=not settings.verify)
        if is_random:
            self._source: RandomWeights | Checkpoint = RandomWeights(config, settings.seed)
        else:
            self._source = Checkpoint(folder, kept, self._on_notice, settings.adapter)
        way = check_architecture(config)
        self._model = self._build(config, way)
        if not self._source.ties_hold(self._model):  # transformers does not tie what a checkpoint keeps apart
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
            self._model = self._build(config, way)
        dtypes = self._source.dtypes(self._model)
        own_files = in_own_files(self._source, self._model, dtypes)
        packed = self._source.packed_formats(self._model)
        path = settings.model + (f" + {settings.adapter}" if settings.adapter else "")
        left_out = self._source.left_out(self._model)
        source = self._source
        origin = Origin(path, source.kind, lambda: source.digest, dtypes, packed, own_files, left_out)
        self.spec: ModelSpec = describe(config, self._model, self._compute_dtype, origin)
        if left_out and self._on_notice:
            self._on_notice(notice_of(left_out, settings.model))
        return own_files

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the weights and delete everything on the disk tier."""
        self._weights = None
        if self._sources is not None:
            self._sources.close()
        self._tiers.close()
        give_back()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what comes after this engine finds the memory free

    def check(self, requests: Sequence[Request]) -> MemoryPlan:
        """Find out, before anything is loaded, whether these requests can be answered within the budgets.

        Raises:
            RequestError: if the model cannot take a request.
            BudgetError: if a tier would have to hold more than its budget.
        """
        return self._arrange(requests, self.policy)[0]

    def _arrange(self, requests: Sequence[Request], policy: Policy) -> tuple[MemoryPlan, Workload]:
        """The plan of the requests' bytes, their shared prefixes and order; raises what `check` does."""
        for index, request in enumerate(requests):
            check_request(index, request, self.spec)
        workload = Workload.of(requests, policy)
        plan = self.plan_for(workload.needs, policy, workload.arrangement.most_alive(policy.block_size))
        if self._weights is None:  # the program may have grown since the engine was made
            self.limits = self._look()
            self._tiers.ledger.limits = dict(self.limits)
        check_plan(plan, self.limits, self._host_limit)
        return plan, workload

    def largest_block(
        self, prompt_tokens: int, new_tokens: int, limits: Mapping[Tier, int] | None = None
    ) -> int:
        """Most sequences of one shape that share a pass within limits, whatever block the policy names.

        Args:
            limits: most bytes of each tier; None for the engine's own.

        Raises:
            BudgetError: if not even one sequence fits.
        """
        request = Request((0,) * prompt_tokens, new_tokens)
        need, batch = RequestShape.of(request, self.policy).need, self.policy.device_batch

        def check(count: int) -> None:
            size = min(count, batch)
            policy = self.policy.replace(device_batch=size, num_device_batches=-(-count // size))
            check_plan(self.plan_for([need] * count, policy), limits or self.limits)

        return most_that_fit(check, MOST_SEQUENCES)

    def plan_for(
        self, needs: Sequence[SequenceNeed], policy: Policy, prefixes: Sequence[int] = ()
    ) -> MemoryPlan:
        """What a policy would hold for such requests, whether it fits or not.

        Args:
            prefixes: tokens of the shared prefixes that may be kept at once.
        """
        packed, on_host = kernels_for(self._device).computes_packed(), self._attends_on_host(policy)
        return plan_memory(self.spec, policy, needs, self._unified, packed, on_host, prefixes)

    def _attends_on_host(self, policy: Policy) -> bool:
        """Whether decoding attends on the CPU to the KV cache in host memory."""
        if self._unified or not policy.kv.host or policy.host_attention is HostAttention.OFF:
            return False
        host = kernels_for(torch.device("cpu"))
        suits = policy.kv_quant is not None or host.attends_exact(self._compute_dtype)
        return policy.host_attention is HostAttention.ON or (suits and native.available())

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
        on_logits: OnLogits | None = None,
    ) -> list[Output]:
        """Answer all requests, generation and scoring mixed, in their order.

        Args:
            on_output: called with (index, output) as soon as a request is finished, in this thread.
            on_progress: called after every pass.
            on_logits: called with (index, position, logits [R, V]) for scored and forced tokens: row r
                predicts the token at ``position + r + 1`` of the request; valid during the call.

        Raises:
            RequestError, BudgetError: before anything is loaded; see `check`.
            StorageError: if a tier fails in the middle; outputs already handed to ``on_output`` stand.
        """
        if not requests:
            return []
        policy = self.policy
        if on_logits is not None:  # every request shows the logits of all of its own tokens
            policy = policy.replace(prefix_sharing=PrefixSharing.OFF)
        plan, workload = self._arrange(requests, policy)
        self._plan = plan
        on_progress = observed(on_progress, self.trace, self._tiers.ledger)
        self._cached = max(RequestShape.of(request, policy).need.cached for request in requests)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        runtime = self._runtime(plan, on_progress, len(requests))
        mark = self._tiers.mark()
        run = None
        try:
            self._tiers.reserve(Tier.HOST, plan.tiers[Tier.HOST][PROCESS], PROCESS)
            run = Run(runtime, plan, requests, workload, on_output, on_progress, on_logits)
            with memory_errors():
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
                self._totals["distinct_tokens"] += workload.arrangement.distinct
                self._placed.update(run.placed)
                run.close()
            self._tiers.release_since(mark)
        return [output for output in run.outputs if output is not None]

    def calibrate(
        self, prompts: Sequence[Sequence[int]], path: Path, on_progress: OnProgress | None = None
    ) -> int:
        """Run prompts and keep the largest magnitude of every linear layer's inputs in a file.

        A policy with ``weight_quant=w8a8,calibration=path`` smooths outliers by it. Returns the tokens seen.

        Raises:
            RequestError, BudgetError, StorageError: as `answer`.
        """
        requests = [Request(tuple(prompt), 1) for prompt in prompts]
        with observing(self._model.model) as largest:
            self.answer(requests, on_progress=on_progress)
        tokens = sum(len(prompt) for prompt in prompts)
        known = {self._model.canonical(name): tensor for name, tensor in largest.items()}
        write_statistics(path, known, self.spec.digest, tokens)
        return tokens

    def record(self) -> EngineRecord:
        """Everything a result has to say about how it came about."""
        plan, spec, ledger = self._plan, self.spec, self._tiers.ledger
        totals = TotalsRecord(**self._totals, seconds=self._seconds, load_seconds=self._load_seconds)
        kernels, on_cuda = kernels_for(self._device).name, self._device.type == "cuda"
        device_peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else None
        return EngineRecord(
            kind="measured",
            model=model_of(spec),
            policy=self.policy.to_dict(),
            placement=placement_of(spec, plan, self._placed) if plan else {},
            stored=stored_of(spec, plan, self.policy, self._cached, kernels) if plan else None,
            memory=memory_of(plan, self.settings.budgets, ledger),
            together=TogetherRecord(plan.together if plan else 0, ledger.peak_together),
            process=ProcessRecord(peak_rss(), device_peak),
            totals=totals,
            savings=savings_of(totals, self.policy),
            streams=self.trace.summary(self._seconds),
            weights_from=None if self._sources is None else self._sources.describe(),
            disk_io=self._tiers.pool.describe(),
            hardware=MachineRecord(
                **hardware(self._device, pretend=not self._unified and self._device.type == "cpu")
            ),
            software=software(),
        )

    def _build(self, config: Any, way: Way) -> LayeredModel:
        """The empty model, in the precision that is fastest here without loss: float32 on a CPU."""
        self._compute_dtype = torch.float32
        if self._device.type == "cuda":
            kept = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
            self._compute_dtype = kept if kept in (torch.float16, torch.bfloat16) else torch.float32
        precision = precision_of(self.policy.matmul_precision, self._device)
        trusts = self.settings.trust_remote_code
        return LayeredModel.empty(config, self._compute_dtype, trusts, precision, way).to(self._device)

    def _runtime(self, plan: MemoryPlan, on_progress: OnProgress | None, requests: int) -> Runtime:
        """The model with its weights, brought in on the first call."""
        if self._weights is None:
            begin = time.perf_counter()
            ledger, mark = self._tiers.ledger, self._tiers.mark()
            forget_peak()
            keep_freed_memory(False)
            taken: dict[Tier, int] = {}
            try:
                for tier, count in plan.while_loading.items():
                    ledger.charge(tier, count, "loading")
                    taken[tier] = count
                with torch.inference_mode(), memory_errors():
                    self._weights = self._load(plan, LoadProgress(self.spec, on_progress, requests, begin))
            except BaseException:
                self._tiers.release_since(mark)
                raise
            finally:
                for tier, count in taken.items():
                    ledger.release(tier, count)
                give_back()
                keep_freed_memory(self._device.type == "cpu")
            self._load_seconds += time.perf_counter() - begin
            self._tiers.start_trimming()
        return Runtime(self.spec, self.policy, self._model, self._weights, self._tiers, self.trace)

    def _load(self, plan: MemoryPlan, progress: LoadProgress) -> WeightStore:
        """Bring the weights into their tiers, by way of the packed store where that is needed."""
        sources = self._loader.find(plan, progress.add, self._on_notice)
        try:
            store = WeightStore(
                self.spec, plan, self._tiers, sources.extents, self._smoothing, sources.scales
            )
            progress.done = 0
            store.fill(self._source.stream(self._model, only=sources.streamed), progress.add)
        except BaseException:
            sources.close()
            raise
        self._sources = sources
        return store
