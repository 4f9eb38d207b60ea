"""What each step of a pass costs: seconds on each resource, as linear forms in the placement's fractions.

The forms are used twice: at the fractions that a placement achieves for one stage or one device batch they
are the duration of its steps, which `engine.plan.simulation.simulate` walks; their coefficients, summed over
a pass, are rows of the linear program of `engine.plan.search.policy_search`.
"""

from __future__ import annotations

from functools import cache, cached_property, lru_cache

from engine.plan.schedule import Op
from engine.plan.simulation.linear import LinearForm
from engine.plan.simulation.state_cost import Phase, Phases, StateCosts
from engine.plan.workload import BatchWork
from engine.spec.float_format import FloatSpec
from engine.spec.hardware import Tier
from engine.spec.kv_layout import KVLayer, KVSlot, kv_layers
from engine.spec.layout import (
    FUSED_ROWS,
    LOGITS_ROWS,
    KeptWeight,
    Ready,
    is_near,
    kept_weight,
    stage_buffer_bytes,
    stays_in_place,
)
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy
from engine.spec.precision import VECTOR_ROWS, MatmulPrecision
from engine.spec.profile import HardwareProfile
from engine.spec.quant import QuantSpec
from engine.spec.rates import IN_FLIGHT, Resource


class CostModel(StateCosts):
    """Costs of one model under one policy's formats on one machine; the policy's fractions do not matter."""

    def __init__(
        self,
        profile: HardwareProfile,
        spec: ModelSpec,
        policy: Policy,
        *,
        host_attention: bool = False,
        computes_packed: bool | None = None,
        kv_slot: KVSlot | None = None,
    ) -> None:
        """Prepare.

        Args:
            host_attention: whether decoding attends on the CPU to the KV cache in host memory.
            computes_packed: as `engine.plan.memory.plan_memory`; by default on a CPU only, as the engine's.
            kv_slot: how a sequence lies on disk, of which the newest tokens are in memory.
        """
        super().__init__(profile, spec, policy)
        self.host_attention = host_attention
        self.computes_packed = profile.unified if computes_packed is None else computes_packed
        self._overheads = profile.overheads
        self._kv_unit = kv_slot.units[0] if kv_slot is not None and kv_slot.capacity else 0
        self.equivalents = self._equivalent_layers()

    @cached_property
    def kv_form(self) -> str:
        """The KV cache's format, as written in the keys of a profile."""
        return str(self.policy.kv_quant) if self.policy.kv_quant else self.spec.compute_dtype

    @cached_property
    def kv_width(self) -> float:
        """Values that one token adds to one layer, mean over the layers."""
        return sum(layer.width for layer in self._kv_layers) / len(self._kv_layers)

    def kv_bytes(self, tokens: float, sequences: float) -> float:
        """Bytes that ``tokens`` of ``sequences`` keep at one layer between passes."""
        return self._data_bytes(tokens, sequences) + self._loose(tokens, sequences) * self._row_bytes

    @cached_property
    def head_stays(self) -> bool:
        """Whether an offloaded head stays in the buffer that one pass brought it into."""
        stages = range(self.spec.num_stages)
        kept = [[self._kept(tensor, Tier.DISK) for tensor in self._tensors(stage)] for stage in stages]
        return stays_in_place(stage_buffer_bytes(kept), kept[-1])

    # Steps

    def step(self, op: Op, stage: int, work: BatchWork | None) -> Phases:
        """What a step does. ``work`` is that of its device batch; None for weights."""
        if op is Op.LOAD_WEIGHTS:
            return self._load_weights(self.equivalents[stage])
        assert work is not None
        if op is Op.COMPUTE:
            return self._compute(self.equivalents[stage], work)
        if op is Op.LOAD_KV:
            return self._load_kv(work)
        if op is Op.STORE_KV:
            return self._store_kv(work)
        if op in (Op.LOAD_STATE, Op.STORE_STATE):
            return self.move_state(work, into=op is Op.LOAD_STATE)
        return self._move_hidden(work.new_tokens, into=op is Op.LOAD_HIDDEN)

    @cache  # noqa: B019  a cost model lives as long as its plan
    def _load_weights(self, stage: int) -> Phases:
        """Reading, crossing the link, and unpacking of what is not computed with as it is kept."""
        read = dict.fromkeys(Tier, 0.0)
        cross, unpack = dict(read), dict(read)
        apart = self._each_apart(stage)
        on_disk = [self._kept(tensor, Tier.DISK) for tensor in self._tensors(stage)]
        together = sum(kept.nbytes for kept in on_disk if kept.brought(stage))  # neighbours are read at once
        for tensor in self._tensors(stage):
            for tier in Tier:
                kept = self._kept(tensor, tier)
                if not kept.brought(stage):
                    continue
                if tier is Tier.DISK:
                    read[tier] += kept.nbytes / self._bandwidth(Resource.DISK_READ, together)
                    read[tier] += 0.0 if tensor.is_matrix else apart
                if not kept.near:
                    cross[tier] += self._crossing(Resource.TO_DEVICE, kept.nbytes)
                if kept.ready is Ready.EXACT:
                    unpack[tier] += tensor.numel / self.profile.unpacking(self._form(kept)).at(tensor.numel)
        moving = {
            Resource.DISK_READ: LinearForm.of("weights", read),
            Resource.TO_DEVICE: LinearForm.of("weights", cross),
        }
        return [moving, {Resource.COMPUTE: LinearForm.of("weights", unpack)}]

    def _each_apart(self, stage: int) -> float:
        """Seconds of a vector's own request, where packed matrices are in another file."""
        forms = [self._kept(tensor, Tier.DISK).form for tensor in self._tensors(stage)]
        if not self.profile.capacity[Tier.DISK] or not any(isinstance(form, QuantSpec) for form in forms):
            return 0.0
        return self.latency(Resource.DISK_READ) / IN_FLIGHT

    def _load_kv(self, work: BatchWork) -> Phases:
        """The past of sequences whose KV cache is offloaded."""
        past = work.kv_past + work.kv_shared
        nbytes = self.kv_bytes(past, work.kept)
        on_disk = max(0.0, self._data_bytes(past, work.kept) - work.kept * self._kv_unit / 2)
        each = on_disk / max(work.kept, 1)
        moved = dict.fromkeys(self._offload_tiers, work.kept * self._overheads.per_moved)
        cross = {tier: self._crossing(Resource.TO_DEVICE, nbytes) for tier in self._offload_tiers}
        if self.host_attention:
            cross.pop(Tier.HOST, None)
            moved.pop(Tier.HOST, None)
        read = on_disk / self._bandwidth(Resource.DISK_READ, each) if on_disk else 0.0
        return [
            {self._cpu_resource: LinearForm.of("kv", moved)},
            {
                Resource.DISK_READ: LinearForm.of("kv", {Tier.DISK: read}),
                Resource.TO_DEVICE: LinearForm.of("kv", cross),
            },
        ]

    def _store_kv(self, work: BatchWork) -> Phases:
        """What the pass adds to sequences whose KV cache is offloaded, packed first."""
        decoded = work.decodes if self.host_attention else 0  # those of the host stay there
        nbytes = work.kv_new * self._token_bytes
        pack = self._append_seconds(work.kv_new) if self.policy.kv_quant else 0.0
        each = nbytes / max(work.kept, 1)
        write = nbytes / self._bandwidth(Resource.DISK_WRITE, max(each, self._kv_unit)) if nbytes else 0.0
        share = 1 - decoded / work.kv_new if work.kv_new else 0.0
        cross, busy = {}, {}
        for tier in self._offload_tiers:
            part = share if tier is Tier.HOST else 1.0
            cross[tier] = part * self._crossing(Resource.TO_HOST, nbytes)
            busy[tier] = part * (pack + work.kept * self._overheads.per_moved)
        return [
            {Resource.COMPUTE: LinearForm.of("kv", busy)},
            {
                Resource.DISK_WRITE: LinearForm.of("kv", {Tier.DISK: write}),
                Resource.TO_HOST: LinearForm.of("kv", cross),
            },
        ]

    def _move_hidden(self, tokens: int, into: bool) -> Phases:
        """Hidden states of a batch, to the device or back to their tier."""
        nbytes = tokens * self.spec.hidden_size * self.spec.compute_bytes
        disk = Resource.DISK_READ if into else Resource.DISK_WRITE
        link = Resource.TO_DEVICE if into else Resource.TO_HOST
        copied = dict.fromkeys(Tier, 2 * nbytes / self.profile.memory_bandwidth[Tier.DEVICE])
        cross = dict.fromkeys((Tier.HOST, Tier.DISK), self._crossing(link, nbytes))
        return [
            {
                disk: LinearForm.of("activations", {Tier.DISK: nbytes / self._bandwidth(disk, nbytes)}),
                link: LinearForm.of("activations", cross),
                self._cpu_resource: LinearForm.of("activations", copied),
            }
        ]

    # Computation

    @lru_cache(maxsize=4096)  # noqa: B019
    def _compute(self, stage: int, work: BatchWork) -> Phases:
        if stage == 0:
            return self._embed(work)
        if stage == self.spec.num_stages - 1:
            return [{Resource.COMPUTE: LinearForm(self._head_seconds(work))}]
        over, tokens, hidden = self._overheads, work.new_tokens, self.spec.hidden_size
        handled = self.policy.kv_quant is not None and self.policy.kv_quant.tail_tokens > 0
        seconds = over.per_layer + self._products(stage, tokens)
        seconds += tokens * hidden / self.profile.elementwise.at(tokens, hidden)
        seconds += work.prompts * over.per_prompt
        seconds += work.decodes * (over.per_loose if handled else over.per_decode)
        seconds += self.recurrence(stage, work)
        attention = 4 * self.spec.query_width * work.prompt_pairs * self._attending
        if attention:
            seconds += attention / self.profile.attention.prompt.at(work.prompt_tokens / work.prompts)
        append = dict.fromkeys(Tier, 0.0)
        if work.kv_new:
            near = [tier for tier in Tier if self.policy.kv_quant is None or tier not in self._offload_tiers]
            append.update(dict.fromkeys(near, self._append_seconds(work.kv_new)))
        rest: Phase = {Resource.COMPUTE: LinearForm.of("kv", append, seconds)}
        return [rest, self._decoding(work)] if work.decodes else [rest]

    def _decoding(self, work: BatchWork) -> Phase:
        """Attention of the sequences that decode: on the device, and beside it on the host."""
        on_device = self._decode_seconds(work, on_host=False)
        if not self.host_attention:
            return {Resource.COMPUTE: LinearForm(on_device)}
        compute = self.spec.compute_bytes
        there = work.decodes * (self.spec.query_width + self.kv_width) * compute
        back = work.decodes * self.spec.query_width * compute
        on_host = self._decode_seconds(work, on_host=True) + self._overheads.per_host_attention
        seconds = {
            Resource.COMPUTE: {Tier.DEVICE: on_device, Tier.DISK: on_device},
            Resource.HOST: {Tier.HOST: on_host},
            Resource.TO_HOST: {Tier.HOST: self._crossing(Resource.TO_HOST, there)},
            Resource.TO_DEVICE: {Tier.HOST: self._crossing(Resource.TO_DEVICE, back)},
        }
        return {resource: LinearForm.of("kv", per_tier) for resource, per_tier in seconds.items()}

    def _decode_seconds(self, work: BatchWork, on_host: bool) -> float:
        sharing = self.spec.query_width / max(1, *(key for key, _ in self.spec.kv_widths))
        rates = self.profile.decoding(self.kv_form, sharing, on_host)
        flops = 4 * self.spec.query_width * work.context * self._attending
        read = self.kv_bytes(work.kv_past + work.kv_shared, work.kept)
        memory = read / self.profile.memory_bandwidth[Tier.HOST if on_host else Tier.DEVICE]
        seconds = max(flops / rates.at(max(work.context / work.decodes, 1), work.decodes), memory)
        return seconds * (1 + self.policy.attention_fraction) / 2

    def _embed(self, work: BatchWork) -> Phases:
        """The embedding; rows of an offloaded table are fetched first."""
        over = self._overheads
        seconds = over.per_embed + self.spec.num_layers * over.per_embed_layer
        fetched = work.new_tokens * over.per_table_row
        rows = {
            resource: LinearForm.of("weights", {tier: fetched})
            for tier, resource in ((Tier.DISK, Resource.DISK_READ), (Tier.HOST, Resource.TO_DEVICE))
            if not is_near(tier, self.profile.unified)
        }
        return [rows, {Resource.COMPUTE: LinearForm(seconds)}]

    def _head_seconds(self, work: BatchWork) -> float:
        stage, rows = self.spec.num_stages - 1, work.head_rows
        seconds = work.sequences * self._overheads.per_sequence
        full, rest = divmod(rows, LOGITS_ROWS)
        for count, size in ((full, LOGITS_ROWS), (1, rest)):
            if count and size:
                part = self._overheads.per_head + self._products(stage, size)
                part += size * self.spec.vocab_size / self.profile.logits.at(size)
                seconds += count * part
        return seconds

    @lru_cache(maxsize=4096)  # noqa: B019
    def _products(self, stage: int, rows: int) -> float:
        """Seconds of the products of ``rows`` activations with all matrices of a stage."""
        seconds = 0.0
        memory = self.profile.memory_bandwidth[Tier.DEVICE]
        few = not self.computes_packed and rows <= FUSED_ROWS
        precision = self.policy.matmul_precision if rows > VECTOR_ROWS else MatmulPrecision.HIGHEST
        for tensor in self._tensors(stage):
            if not tensor.is_matrix:
                continue
            kept = self._kept(tensor, Tier.DEVICE)
            exact = kept.ready is Ready.EXACT and not (few and kept.tensor.fused)
            form = self.spec.compute_dtype if exact else self._form(kept)
            nbytes = tensor.numel * self.spec.compute_bytes if exact else kept.nbytes
            visited = 1.0
            if len(tensor.shape) > 2 and self.spec.experts_per_token:
                visited = min(1.0, self.spec.experts_per_token / tensor.shape[0])
            flops = 2.0 * rows * tensor.numel * visited
            rates = self.profile.product(form, precision)
            seconds += max(flops / rates.at(rows, tensor.numel), nbytes / memory)
        return seconds

    # What is where

    def _append_seconds(self, tokens: int) -> float:
        values = tokens * self.kv_width
        return values / self.profile.appending(self.kv_form).at(values) if values else 0.0

    @cached_property
    def _kv_layers(self) -> tuple[KVLayer, ...]:
        return kv_layers(self.spec, self.policy)

    @cached_property
    def _attending(self) -> float:
        """Fraction of the layers that attend."""
        return sum(layer.width > 0 for layer in self._kv_layers) / len(self._kv_layers)

    @cached_property
    def _row_bytes(self) -> float:
        return self.kv_width * self.spec.compute_bytes

    @cached_property
    def _token_bytes(self) -> float:
        """Bytes of a token's row, packed where the cache is packed."""
        form = self.policy.kv_quant
        if form is None:
            return self._row_bytes
        return sum(layer.block_bytes for layer in self._kv_layers) / len(self._kv_layers) / form.block_tokens

    def _loose(self, tokens: float, sequences: float) -> float:
        """Mean number of tokens that are exact rows, packed later."""
        form = self.policy.kv_quant
        if form is None:
            return 0.0
        return min(tokens, sequences * (form.residual + (form.block_tokens - 1) / 2))

    def _data_bytes(self, tokens: float, sequences: float) -> float:
        return (tokens - self._loose(tokens, sequences)) * self._token_bytes

    def _tensors(self, stage: int) -> list[TensorSpec]:
        return [self.spec.tensors[name] for name in self.spec.stages[stage]]

    @cache  # noqa: B019
    def _kept(self, tensor: TensorSpec, tier: Tier) -> KeptWeight:
        spec = self.spec
        return kept_weight(
            tensor, tier, self.policy, spec.compute_dtype, self.profile.unified, self.computes_packed
        )

    def _form(self, kept: KeptWeight) -> str:
        """A weight's format, as written in the keys of a profile."""
        if kept.form is None:
            return kept.dtype
        return kept.form.dtype if isinstance(kept.form, FloatSpec) else str(kept.form)

    def _equivalent_layers(self) -> list[int]:
        """Per stage the first one with the same tensors, so that each kind is counted once."""
        first: dict[tuple[object, ...], int] = {}
        found = []
        for stage, names in enumerate(self.spec.stages):
            in_layer = 0 < stage < self.spec.num_stages - 1
            parts = [self.spec.tensors[name] for name in names]
            formats = tuple((t.shape, t.dtype, t.fused, str(self.policy.weight_quant.of(t))) for t in parts)
            states = self.spec.states[stage - 1] if in_layer and self.spec.has_state else ()
            key = (in_layer or stage, formats, states)
            found.append(first.setdefault(key, stage))
        return found
