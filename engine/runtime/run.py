"""One call of the engine: passes over the block until every request is answered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from engine.memory.hidden import HiddenStore
from engine.memory.kv.cache import KVCache
from engine.memory.state.store import StateStore
from engine.plan.workload import Operations, RequestShape, Workload
from engine.runtime.batching import Block
from engine.runtime.executor import Executor, OnLogits, Runtime
from engine.runtime.sampling import finish_reason
from engine.runtime.sequences import PassShare, PrefixSequence, RequestSequence, SlotSequence
from engine.runtime.threads import Threads
from engine.spec.hardware import Tier
from engine.spec.kv_layout import kv_bytes, prefix_bytes
from engine.spec.memory_plan import MemoryPlan
from engine.spec.policy import Schedule
from engine.spec.request import CallProgress, OnOutput, OnProgress, Output, Request


class Run:
    """Admits requests, walks passes, hands out answers.

    Attributes:
        outputs: the answers so far, in the order of the requests.
        totals: counts of requests, passes and tokens, as `engine.runtime.record.savings_of` reads them.
        seconds: wall time of the passes.
    """

    def __init__(
        self,
        runtime: Runtime,
        plan: MemoryPlan,
        requests: Sequence[Request],
        workload: Workload,
        on_output: OnOutput | None = None,
        on_progress: OnProgress | None = None,
        on_logits: OnLogits | None = None,
    ) -> None:
        self._on_output, self._on_progress = on_output, on_progress
        runtime.tiers.reserve(Tier.DEVICE, plan.reserved, "workspace")
        overlapped = runtime.policy.schedule is Schedule.OVERLAPPED
        self._kv_cache = KVCache(
            runtime.spec, runtime.policy, plan, runtime.tiers, runtime.trace if overlapped else None
        )
        self._state_store = StateStore(runtime.spec, runtime.policy, plan, runtime.tiers)
        hidden = HiddenStore(runtime.spec, plan, runtime.tiers, runtime.policy.num_device_batches)
        self._spec, self._policy, self._tiers = runtime.spec, runtime.policy, runtime.tiers
        self._block = Block(requests, runtime.policy, workload.arrangement)
        self._work = sum(need.computed for need in workload.needs)
        self._work += sum(request.max_new_tokens for request in requests)
        self._work_left = self._work
        self.outputs: list[Output | None] = [None] * len(requests)
        self.totals: Counter[str] = Counter()
        self.seconds = self._began = self._reported = 0.0
        self._operations, self._threads = Operations.of(runtime.spec), Threads()
        self._executor = Executor(runtime, self._kv_cache, self._state_store, hidden, on_logits)

    def answer_all(self) -> None:
        """Run until every request is answered."""
        with ExitStack() as stack:
            stack.callback(self._threads.restore)
            self._began = self._reported = time.perf_counter()
            while True:
                self._block.refill(self._admit)
                active = self._block.active
                in_progress = [*active, *self._block.prefix_only]
                if not in_progress:
                    return
                self._threads.adjust()
                work = [sequence.work(self._operations) for sequence in in_progress]
                if active:
                    batches = [list(batch) for batch in self._block.batches if batch]
                    self._executor.run_pass(batches, self._expects_more(active), self._report_within_pass)
                    self.totals["passes"] += 1
                self._tiers.trim()
                self.totals["slots_taken"] += len(active)
                shares = list(zip(in_progress, self._shares(work), strict=True))
                for sequence, share in shares:
                    if isinstance(sequence, PrefixSequence):  # its slot is free, its KV cache stays
                        self._work_left -= len(sequence.fresh)
                        sequence.prefix.computed_in = share
                        self._block.leave(sequence)
                self._round_prefixes(in_progress)
                for sequence, share in shares:
                    if isinstance(sequence, RequestSequence):
                        self._after_pass(sequence, share)
                self._report(1.0)

    def _shares(self, work: Sequence[float]) -> list[PassShare]:
        """Share the time since the last pass among sequences by their work, or evenly if there was none."""
        before, self.seconds = self.seconds, time.perf_counter() - self._began
        wall, number, total = self.seconds - before, self.totals["passes"], sum(work)
        parts = [own / total if total else 1 / len(work) for own in work]
        return [PassShare(number, wall, wall * part) for part in parts]

    @property
    def placed(self) -> dict[tuple[str, Tier], int]:
        """Bytes of KV cache (``kv``) and of recurrent state (``state``) placed in each tier so far."""
        kinds = {"kv": self._kv_cache.placed, "state": self._state_store.placed}
        return {(kind, tier): nbytes for kind, placed in kinds.items() for tier, nbytes in placed.items()}

    def close(self) -> None:
        """Stop the streams; the caller, who marked the tiers before, frees what was allocated."""
        self._executor.close()

    def _admit(self, sequence: SlotSequence) -> None:
        """Allocate the KV cache and the state of a sequence that takes a slot."""
        self.totals["computed_tokens"] += len(sequence.fresh)
        self.totals["padding_tokens"] += sequence.padding
        if isinstance(sequence, PrefixSequence):
            sequence.prefix.region = self._kv_cache.prefixes.allocate(
                len(sequence.fresh), sequence.prefix.decodes
            )
            sequence.prefix.snapshot = self._state_store.snapshot()
            self.totals["kv_bytes_saved"] -= prefix_bytes(self._kv_cache.layers, len(sequence.fresh))
            return
        assert isinstance(sequence, RequestSequence)
        need = RequestShape.of(sequence.request, self._policy, sequence.begin).need
        sequence.region = self._kv_cache.allocate(sequence.slot, need.cached, sequence.padding)
        sequence.state = self._state_store.allocate(sequence.slot, need.cached)
        if sequence.region is not None:
            self.totals["kv_bytes_saved"] += kv_bytes(self._spec, self._policy, sequence.begin)

    def _expects_more(self, active: Sequence[SlotSequence]) -> bool:
        if self._block.has_waiting:
            return True
        return any(
            len(sequence.tokens) + 1 < sequence.request.max_new_tokens
            for sequence in active
            if isinstance(sequence, RequestSequence)
        )

    def _round_prefixes(self, active: Sequence[SlotSequence]) -> None:
        """Pack the prefixes that were computed; free exact versions that no prompt attends to any more."""
        prefixes = {
            prefix for sequence in active if sequence.done == len(sequence.fresh) for prefix in sequence.chain
        }
        prefixes |= {sequence.prefix for sequence in active if isinstance(sequence, PrefixSequence)}
        for prefix in prefixes:
            assert prefix.region is not None
            if prefix.decodes:
                self._kv_cache.prefixes.keep(prefix.region, exact=prefix.waiting > 0)

    def _after_pass(self, sequence: RequestSequence, share: PassShare) -> None:
        """Account for a pass; the sequence goes on with its new token, or leaves its slot."""
        request = sequence.request
        sequence.take_part(share)
        if sequence.passes == 1:
            self.totals["prompt_tokens"] += len(request.computed_tokens)
            self.totals["shared_tokens"] += sequence.begin
            self._work_left -= sequence.done
        else:
            self.totals["computed_tokens"] += 1
        if request.max_new_tokens:
            self.totals["generated_tokens"] += not sequence.answered
            self._work_left -= 1
        if not sequence.answered:
            reason = finish_reason(request, sequence.tokens)
            if reason is not None:
                self._answer(sequence, sequence.output(reason))
        left = request.max_new_tokens - len(sequence.tokens)
        if not sequence.answered or (left and not self._policy.early_leaving):
            sequence.fresh = [sequence.tokens[-1]]
            return
        self._work_left -= left
        if sequence.region is not None:
            self._kv_cache.free(sequence.region)
        if sequence.state is not None:
            self._state_store.free(sequence.state)
        for prefix in self._block.leave(sequence):
            assert prefix.region is not None
            self._kv_cache.prefixes.free(prefix.region)
            if prefix.snapshot is not None:
                self._state_store.drop(prefix.snapshot)

    def _answer(self, sequence: RequestSequence, output: Output) -> None:
        """Hand out a finished request's output."""
        sequence.answered = True
        self.totals["requests"] += 1
        self.outputs[sequence.index] = output
        if self._on_output is not None:
            self._on_output(sequence.index, output)

    def _report_within_pass(self, pass_done: float) -> None:
        """Report progress within a pass, which may take minutes, at most once a second."""
        self._threads.adjust()
        if time.perf_counter() - self._reported > 1:
            self._report(pass_done)

    def _report(self, pass_done: float) -> None:
        if self._on_progress is None:
            return
        self._reported = time.perf_counter()
        seconds = self._reported - self._began
        done: float = self._work - self._work_left
        if pass_done < 1:
            done += pass_done * sum(len(sequence.fresh) for sequence in self._block.active)
        progress = CallProgress(
            finished=self.totals["requests"],
            total=len(self.outputs),
            passes=self.totals["passes"],
            generated_tokens=self.totals["generated_tokens"],
            prompt_tokens=self.totals["prompt_tokens"],
            seconds=seconds,
            eta_seconds=seconds * (self._work - done) / max(done, 1),
            pass_done=pass_done,
            in_progress={
                sequence.index: len(sequence.tokens)
                for sequence in self._block.active
                if isinstance(sequence, RequestSequence) and not sequence.answered
            },
        )
        self._on_progress(progress)
