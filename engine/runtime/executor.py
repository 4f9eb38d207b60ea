"""Walks a schedule: one step after the other, or with the transfers of later steps on streams meanwhile.

Both ways run the same steps on the same data; only what waits for what differs. `plan/schedule.py`
decides which steps there are; what they do is here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.kernels.backend import kernels_for
from engine.kernels.calls import Computable
from engine.memory.hidden import HiddenStore
from engine.memory.kv.cache import KVCache
from engine.memory.state.store import StateStore
from engine.memory.storage import Tiers
from engine.memory.transfer import Stream, Ticket
from engine.memory.weights.placed import WeightStore
from engine.models.adapter import LayeredModel, StagePlaces
from engine.models.attention import AttentionBatch
from engine.models.decoder.stand_ins import LayerCall
from engine.models.decoder.ways import SequenceCalls
from engine.plan.schedule import PREFETCHED, STREAMS, TWO_AT_ONCE, Key, Op, PassShape, Step, schedule
from engine.plan.verify import verify
from engine.runtime.batching import prefix_batch
from engine.runtime.sampling import log_probabilities, top_tokens
from engine.runtime.sequences import RequestSequence, Score, SlotSequence, WantedRow
from engine.spec.layout import LOGITS_ROWS, STAGE_BUFFERS
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy, Schedule
from engine.trace import Trace

OnLogits = Callable[[int, int, Tensor], None]
"""Called with (request, position, logits [R, V]): row r predicts the token at ``position + r + 1``."""


@dataclass(frozen=True)
class Runtime:
    """A model with its weights in place, ready to run."""

    spec: ModelSpec
    policy: Policy
    model: LayeredModel
    weights: WeightStore
    tiers: Tiers
    trace: Trace


class DeviceBatch:
    """What is computed at once, with what a pass needs to know of it."""

    def __init__(
        self, sequences: Sequence[SlotSequence], device: torch.device, state_store: StateStore
    ) -> None:
        """Take the sequences' fresh tokens as they are now."""
        self.sequences = sequences
        self.lengths = [len(sequence.fresh) for sequence in sequences]
        self.regions = [sequence.region for sequence in sequences]
        firsts = itertools.accumulate(self.lengths, initial=0)
        self.states = state_store.batch(
            [sequence.state_use(first) for sequence, first in zip(sequences, firsts, strict=False)]
        )
        self.prefixes = prefix_batch(sequences, device)
        """Who attends to which prefix, and which prefixes are computed; None for neither."""

        padding = [sequence.padding if sequence.done == 0 else 0 for sequence in sequences]
        self.padding = padding if any(padding) else []
        """Fresh tokens of each sequence that nothing attends to; empty for none anywhere."""

        first = self.padding or [0] * len(sequences)
        self.begins = [sequence.position(padding) for sequence, padding in zip(sequences, first, strict=True)]
        """Position of each sequence's first fresh token after its padding."""

        self.calls: Sequence[LayerCall | SequenceCalls | None] | None = None


@dataclass(frozen=True)
class _HeadRow:
    """One position whose logits are wanted."""

    sequence: SlotSequence
    place: int
    """Among the packed tokens of the device batch."""

    wanted: WantedRow


class Executor:
    """Runs passes over a block."""

    def __init__(
        self,
        runtime: Runtime,
        kv_cache: KVCache,
        state_store: StateStore,
        hidden: HiddenStore,
        on_logits: OnLogits | None = None,
    ) -> None:
        self._spec, self._model, self._trace = runtime.spec, runtime.model, runtime.trace
        self._weights, self._tiers = runtime.weights, runtime.tiers
        self._policy, self._kernels = runtime.policy, kernels_for(runtime.tiers.device)
        self._kv_cache, self._hidden, self._on_logits = kv_cache, hidden, on_logits
        self._state_store = state_store
        recurrent = (False, *map(bool, self._spec.states), False)
        self._state_moves = recurrent if state_store.moves else ()
        self._overlapped = self._policy.schedule is Schedule.OVERLAPPED
        self._streams: dict[str, Stream] = {}
        for name in sorted({*STREAMS.values()} - {"compute"}) if self._overlapped else ():
            threads = self._weights.loads_at_once if name == TWO_AT_ONCE else 1
            self._streams[name] = Stream(name, self._trace, self._tiers.device, threads)
        self._first_buffer = 0
        self._preloaded: dict[int, Ticket] = {}  # by stage
        self._verified: set[PassShape] = set()
        self._batches: list[DeviceBatch] = []
        self._most_tokens = 0  # of one device batch in this pass
        self._in_stage: tuple[int, StagePlaces] | None = None
        self._places: dict[int, tuple[Mapping[str, Computable], StagePlaces]] = {}  # by the tensors' identity
        self._on_cell: Callable[[float], None] | None = None

    def run_pass(
        self,
        batches: Sequence[Sequence[SlotSequence]],
        more: bool,
        on_cell: Callable[[float], None] | None = None,
    ) -> None:
        """One sweep over all stages for all device batches; every sequence gains what its fresh tokens yield.

        Args:
            batches: sequences of each device batch, none empty.
            more: whether another pass is expected, so that its first weights may be fetched already.
            on_cell: called after every computation with the fraction of the pass that is computed.

        Raises:
            TierbenchError: what a stream met; all streams are stopped then.
        """
        self._batches = [
            DeviceBatch(sequences, self._tiers.device, self._state_store) for sequences in batches
        ]
        self._most_tokens = max(sum(batch.lengths) for batch in self._batches)
        self._on_cell = on_cell
        needed = self._weights.needed()
        shape = PassShape(
            self._spec.num_stages, len(batches), needed, self._kv_cache.moves, self._hidden.moves,
            first_buffer=self._first_buffer, preloaded=bool(self._preloaded),
            prefetch_next=more and self._overlapped and any(needed[:PREFETCHED]), state=self._state_moves,
        )  # fmt: skip
        self._shape = shape
        steps = list(schedule(shape, lookahead=1 if self._overlapped else 0))
        if shape not in self._verified:
            verify(steps, shape)
            self._verified.add(shape)
        with torch.inference_mode():
            try:
                self._walk(steps, shape)
            except BaseException:
                self.close()
                raise
            finally:
                self._leave_stage()
        for batch in self._batches:
            for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
                sequence.done += length
                if sequence.region is not None:
                    sequence.region.length = sequence.done

    def close(self) -> None:
        """Stop the streams; what they were moving is lost."""
        for stream in self._streams.values():
            stream.stop()
        for stream in self._streams.values():
            stream.close()
        self._kv_cache.close()

    def _walk(self, steps: Sequence[Step], shape: PassShape) -> None:
        """Compute here, in the order of the steps; hand transfers to streams, or do them here without any."""
        tickets: dict[Key, Ticket] = {}
        preloaded, self._preloaded = self._preloaded, {}
        for step in steps:
            what = f"{step.op} {step.stage}.{step.batch}"
            if step.op is not Op.COMPUTE:
                self._transfer(step, what, tickets)
                continue
            for key in step.after if self._overlapped else ():
                tickets[key].wait()
            if step.stage in preloaded:
                preloaded.pop(step.stage).wait()
            with self._trace.span("compute", what):
                batch = self._batches[step.batch]
                self._enter_stage(step.stage)
                if step.stage == 0:
                    self._embed(step.batch, batch)
                else:
                    hidden = self._hidden.take(step.batch, step.buffer_index)
                    if step.stage == shape.num_stages - 1:
                        self._finish(batch, hidden)
                    else:
                        assert batch.calls is not None
                        layer, attention = step.stage - 1, self._attention(step, batch)
                        states = self._state_store.view(layer, step.buffer_index, batch.states)
                        hidden = self._model.run_layer(layer, hidden, batch.calls[layer], attention, states)
                        self._hidden.put(step.batch, hidden)
            if self._overlapped:
                on_cuda = self._tiers.device.type == "cuda"
                tickets[step.key] = ticket = Ticket()
                ticket.finish(event=torch.cuda.current_stream().record_event() if on_cuda else None)
            self._computed(step.stage, step.batch)
        ahead = [key for key in tickets if key[1] >= shape.num_stages]
        self._preloaded = {key[1] - shape.num_stages: tickets.pop(key) for key in ahead}
        for ticket in tickets.values():  # no step of this pass is left to race with the next one's
            ticket.synchronize()
        if self._overlapped:
            self._first_buffer = shape.next_first_buffer

    def _transfer(self, step: Step, what: str, tickets: dict[Key, Ticket]) -> None:
        """Hand a step's transfer to its stream, after the steps it waits for; without streams, do it now."""
        if self._overlapped:
            after = [tickets[key] for key in step.after]
            tickets[step.key] = self._streams[step.stream].submit(what, self._job(step), after)
            return
        with self._trace.span(step.stream, what) as span:
            span.bytes = self._job(step)()

    def _job(self, step: Step) -> Callable[[], int]:
        """What a transfer does, as a function that returns the bytes it moved."""
        stage, buffer_index = step.stage % self._spec.num_stages, step.buffer_index
        if step.op is Op.LOAD_WEIGHTS:
            # The next pass's first stages are fetched before its tokens are known.
            rows = self._most_tokens if stage == step.stage else None
            return lambda: self._weights.load(stage, buffer_index, rows)
        batch = self._batches[step.batch]
        regions = batch.regions
        slots = [sequence.slot for sequence in batch.sequences]
        if step.op is Op.LOAD_KV:
            return lambda: (
                self._kv_cache.load(stage - 1, buffer_index, regions, batch.lengths)
                + (self._load_prefixes(stage) if step.batch == 0 else 0)
            )
        if step.op is Op.STORE_KV:
            return lambda: self._kv_cache.store(buffer_index) + self._store_prefixes(stage, batch)
        if step.op is Op.LOAD_STATE:
            return lambda: self._state_store.load(stage - 1, buffer_index, batch.states)
        if step.op is Op.STORE_STATE:
            return lambda: self._state_store.store(buffer_index)
        if step.op is Op.LOAD_HIDDEN:
            return lambda: self._hidden.load(step.batch, buffer_index, slots, batch.lengths)
        assert step.op is Op.STORE_HIDDEN
        return lambda: self._hidden.store(step.batch, slots, batch.lengths)

    def _load_prefixes(self, stage: int) -> int:
        """For all device batches at once, as a layer's weights are."""
        batches = [batch.prefixes for batch in self._batches if batch.prefixes]
        return self._kv_cache.prefixes.load(stage - 1, stage % STAGE_BUFFERS, batches)

    def _store_prefixes(self, stage: int, batch: DeviceBatch) -> int:
        if batch.prefixes is None:
            return 0
        return self._kv_cache.prefixes.store(stage - 1, stage % STAGE_BUFFERS, batch.prefixes)

    def _computed(self, stage: int, batch: int) -> None:
        if self._on_cell is not None:
            count = len(self._batches)
            self._on_cell((stage * count + batch + 1) / (self._spec.num_stages * count))

    def _attention(self, step: Step, batch: DeviceBatch) -> AttentionBatch:
        """What attention has to know of a device batch at a layer."""
        layer, prefixes = step.stage - 1, None
        view = self._kv_cache.view(layer, step.buffer_index, batch.regions, batch.lengths)
        if batch.prefixes:
            prefixes = self._kv_cache.prefixes.view(layer, step.stage % STAGE_BUFFERS, batch.prefixes)
        return AttentionBatch(
            batch.lengths, view, self._policy.attention_fraction, view.host, prefixes, batch.padding,
            batch.begins, self._model.precision,
        )  # fmt: skip

    def _enter_stage(self, stage: int) -> None:
        """Point the model at a stage's weights, for all device batches that visit it."""
        if self._in_stage is not None and self._in_stage[0] == stage:
            return
        self._leave_stage()
        weights = self._weights.tensors(stage, self._shape.buffer_of(stage))
        if id(weights) not in self._places:
            self._places[id(weights)] = weights, self._model.places(stage, weights)
        _, places = self._places[id(weights)]
        places.fill()
        self._in_stage = stage, places

    def _leave_stage(self) -> None:
        if self._in_stage is not None:
            self._in_stage[1].empty()
            self._in_stage = None

    def _embed(self, index: int, batch: DeviceBatch) -> None:
        ids = [token for sequence in batch.sequences for token in sequence.fresh]
        positions = [
            sequence.position(offset)
            for sequence, length in zip(batch.sequences, batch.lengths, strict=True)
            for offset in range(length)
        ]
        device = self._tiers.device
        packed = torch.tensor([ids], device=device), torch.tensor([positions], device=device)  # [1, P] each
        hidden, batch.calls = self._model.embed(*packed, batch.lengths, batch.padding)
        self._hidden.put(index, hidden)

    def _finish(self, batch: DeviceBatch, hidden: Tensor) -> None:
        """Head: log-probabilities of scored tokens, and the next token of generating sequences."""
        rows: list[_HeadRow] = []
        start = 0
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            rows += (_HeadRow(sequence, start + wanted.offset, wanted) for wanted in sequence.rows())
            start += length
        for begin in range(0, len(rows), LOGITS_ROWS):
            part = rows[begin : begin + LOGITS_ROWS]
            index = torch.tensor([row.place for row in part], device=hidden.device)
            logits = self._model.head(hidden[:, index])  # [R, V]
            places, lse = self._kernels.summarise(logits)
            best = places.tolist()
            chosen = [
                row.sequence.choose(logits[i], best[i]) if row.wanted.token is None else row.wanted.token
                for i, row in enumerate(part)
            ]
            targets = torch.tensor(chosen, device=logits.device)
            scores = log_probabilities(logits, targets, lse).tolist()
            if not all(map(math.isfinite, scores)):
                bad = next(
                    row.sequence for row, score in zip(part, scores, strict=True) if not math.isfinite(score)
                )
                raise StorageError(
                    f"{bad.name} got a log-probability that is not finite, computed in "
                    f"{self._spec.compute_dtype}: the weights are damaged or overflow in this precision"
                )
            self._show(part, logits)
            for i, (row, token, score) in enumerate(zip(part, chosen, scores, strict=True)):
                wanted, top = row.wanted, None
                if wanted.top:
                    top = top_tokens(logits[i], float(lse[i]), token, best[i], wanted.top)
                row.sequence.take(wanted, token, Score(score, token == best[i], top))

    def _show(self, rows: Sequence[_HeadRow], logits: Tensor) -> None:
        """Hand the logits of scored and forced positions out, sequence by sequence."""
        if self._on_logits is None:
            return
        for sequence, group in itertools.groupby(enumerate(rows), key=lambda item: item[1].sequence):
            if not isinstance(sequence, RequestSequence) or sequence.answered:
                continue
            shown = [(i, row) for i, row in group if row.wanted.token is not None or sequence.request.forced]
            if shown:
                first = sequence.position(shown[0][1].wanted.offset)
                self._on_logits(sequence.index, first, logits[shown[0][0] : shown[-1][0] + 1])
