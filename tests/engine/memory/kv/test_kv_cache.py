"""The KV cache against a plain list of rows: what attention reads, and what goes to and from the disk."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import reference_attention
from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, HeadShape
from engine.kernels.cpu import native
from engine.kernels.reference_attention import unpack_tokens
from engine.memory.kv.batch import BatchKeyValues
from engine.memory.kv.cache import KVCache
from engine.memory.kv.host_attention import OnHost
from engine.memory.kv.regions import Region
from engine.memory.storage import DiskFile, Tiers
from engine.plan.memory import SequenceNeed, plan_memory
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.kv_layout import KVLayer, KVSlot
from engine.spec.layout import ALIGNMENT
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy
from tests.engine.kernels.cpu.native_inputs import attention_call
from tests.support.engine_compression import rounded

FORMATS = ["16", "4", "2-g8", "4-channel-g8/4", "4-channel-g8/4+5", "8-g16+3", "float16", "bfloat16/4+2"]
WIDTHS = ((64, 32), (32, 32))
"""Keys and values of one token, per layer."""


def spec_of(widths: tuple[tuple[int, int], ...] = WIDTHS) -> ModelSpec:
    """The part of a model's description that the KV cache needs."""
    weight = TensorSpec("weight", (32, 32), "float32", compressible=False)
    return ModelSpec(
        "Test", "test", len(widths), 32, 32, 0, 4, 32, None, 128, True, widths, {"weight": weight},
        (("weight",),) * (len(widths) + 2), "float32", "float32", str, "random", "",
    )  # fmt: skip


class Admitted:
    """One sequence: its rows so far per layer (the oracle), and its slot in the cache."""

    def __init__(self, slot: int, region: Region | None, prompt: int, capacity: int) -> None:
        self.slot, self.region, self.fresh, self.capacity = slot, region, prompt, capacity
        self.rows = [torch.empty(0, sum(widths)) for widths in WIDTHS]


class Bench:
    """A KV cache with sequences in some of its slots, to run passes on it as the executor does."""

    def __init__(
        self, policy: Policy, needs: list[SequenceNeed], unified: bool, folder: Path, host: bool = False
    ) -> None:
        spec = spec_of()
        self.plan: MemoryPlan = plan_memory(spec, policy, needs, unified, host_attention=host)
        limits = {tier: self.plan.total(tier) for tier in Tier}
        if unified:
            limits[Tier.HOST] += limits[Tier.DEVICE]
        self.tiers = Tiers(torch.device("cpu"), unified, limits, folder)
        self.cache = KVCache(spec, policy, self.plan, self.tiers)
        self.form = policy.kv_quant
        self.admitted: list[Admitted] = []
        self.at_once = 0
        self.random = torch.Generator().manual_seed(1)

    def admit(self, slot: int, need: SequenceNeed) -> Admitted:
        region = self.cache.allocate(slot, need.cached)
        sequence = Admitted(slot, region, need.computed, need.cached)
        self.admitted.append(sequence)
        return sequence

    def leave(self, sequence: Admitted) -> None:
        if sequence.region is not None:
            self.cache.free(sequence.region)
        self.admitted.remove(sequence)

    def run_pass(self) -> tuple[int, int]:
        """One pass over all layers; returns the bytes that were loaded and stored."""
        regions = [sequence.region for sequence in self.admitted]
        fresh = [sequence.fresh for sequence in self.admitted]
        loaded = stored = 0
        for layer in range(len(WIDTHS)):
            buffer_index = layer % 2
            if self.cache.moves:
                loaded += self.cache.load(layer, buffer_index, regions, fresh)
            view = self.cache.view(layer, buffer_index, regions, fresh)
            keys, values = WIDTHS[layer]
            rows = [torch.randn(s.fresh, keys + values, generator=self.random) for s in self.admitted]
            on_host: Seq[int] = () if view.host is None else view.host.indices
            if view.host is not None:
                self.attend_on_host(view.host, layer, torch.cat([rows[index] for index in on_host]))
            if self.random_bit() and self.decodes(view, layer, rows):
                for sequence, new in zip(self.admitted, rows, strict=True):
                    sequence.rows[layer] = torch.cat([sequence.rows[layer], new])
                stored += self.cache.store(buffer_index) if self.cache.moves else 0
                continue
            for index, (sequence, new) in enumerate(zip(self.admitted, rows, strict=True)):
                if index not in on_host:
                    found = view.extend(index, new[:, None, :keys], new[:, None, keys:])
                    self.check(found, sequence, layer, new)
                sequence.rows[layer] = torch.cat([sequence.rows[layer], new])
            view.commit()
            if self.cache.moves:
                stored += self.cache.store(buffer_index)
        for sequence in self.admitted:
            if sequence.region is not None:
                sequence.region.length += sequence.fresh
            sequence.fresh = 1
        return loaded, stored

    def random_bit(self) -> bool:
        return bool(torch.randint(2, (1,), generator=self.random))

    def decodes(self, view: BatchKeyValues, layer: int, rows: list[Tensor]) -> bool:
        """Attend for the whole batch at once, if that is possible, and compare with one by one."""
        keys, values = WIDTHS[layer]
        shape, new = HeadShape(4, 2, keys // 2, values // 2), torch.cat(rows)
        query = torch.randn(len(new), 4, keys // 2, generator=self.random)
        parts = new[:, :keys].view(-1, 2, keys // 2), new[:, keys:].view(-1, 2, values // 2)
        got = torch.empty(len(new), 4, values // 2)
        if not view.decode(AttentionCall(query, *parts, shape, AttentionOptions(0.3), got)):
            return False
        self.at_once += 1
        self.compare(got, query, range(len(new)), new, layer, shape)
        return True

    def attend_on_host(self, host: OnHost, layer: int, rows: Tensor) -> None:
        """Two heads per group attend to the past in its stored format, and to the new row exactly."""
        keys, values = WIDTHS[layer]
        shape = HeadShape(4, 2, keys // 2, values // 2)
        query = torch.randn(len(rows), 4, keys // 2, generator=self.random)
        parts = rows[:, :keys].view(-1, 2, keys // 2), rows[:, keys:].view(-1, 2, values // 2)
        got = torch.empty(len(rows), 4, values // 2)
        host.begin(AttentionCall(query, *parts, shape, AttentionOptions(0.3), got))()
        self.compare(got, query, host.indices, rows, layer, shape)

    def compare(
        self, got: Tensor, query: Tensor, indices: Seq[int], rows: Tensor, layer: int, shape: HeadShape
    ) -> None:
        keys = WIDTHS[layer][0]
        seen = []
        for index, row in zip(indices, rows, strict=True):
            past = self.admitted[index].rows[layer].clone()
            packed = self.form.packed_tokens(len(past)) if self.form else 0
            if packed:
                assert self.form is not None
                past[:packed, :keys] = rounded(past[:packed, :keys], self.form.keys)
                past[:packed, keys:] = rounded(past[:packed, keys:], self.form.values)
            seen.append(CachedSequence(torch.empty(0, dtype=torch.uint8), 0, torch.cat([past, row[None]])))
        call = attention_call(query, shape, AttentionOptions(0.3), torch.empty_like(got))
        expected = reference_attention.attention(call, seen)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def check(
        self, found: tuple[Tensor, Tensor] | CachedSequence, sequence: Admitted, layer: int, new: Tensor
    ) -> None:
        """Attention reads the past in its stored format, and the new tokens exactly."""
        keys, values = WIDTHS[layer]
        past = sequence.rows[layer]
        if isinstance(found, tuple):
            got = torch.cat([part.reshape(len(part), -1) for part in found], dim=1)
            expected = new if sequence.region is None else torch.cat([past, new])
            assert torch.equal(got, expected)
            return
        packed = found.packed_tokens
        assert packed == (self.form.packed_tokens(len(past)) if self.form else 0)
        assert torch.equal(found.rows, torch.cat([past[packed:], new]))
        if packed:
            assert self.form is not None
            got = torch.empty(packed, keys + values)
            unpack_tokens(found.packed, packed, self.form, keys, values, got)
            assert torch.equal(got[:, :keys], rounded(past[:packed, :keys], self.form.keys))
            assert torch.equal(got[:, keys:], rounded(past[:packed, keys:], self.form.values))

    def close(self) -> None:
        self.tiers.close()
        assert self.tiers.ledger.held == dict.fromkeys(Tier, 0)


@contextmanager
def units(unit: int, share: int, stage: int) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch("engine.spec.kv_layout.KV_UNIT", unit))
        stack.enter_context(mock.patch("engine.spec.kv_layout.KV_TAIL_SHARE", share))
        stack.enter_context(mock.patch("engine.plan.memory.KV_STAGE", stage))
        yield


@st.composite
def needs(draw: st.DrawFn) -> SequenceNeed:
    computed = draw(st.integers(1, 60))
    return SequenceNeed(computed, draw(st.sampled_from([0, 1])) * (computed + draw(st.integers(1, 40))))


@given(
    data=st.data(),
    form=st.sampled_from(FORMATS),
    kv=st.sampled_from(["disk", "0.3/0.3/0.4", "0/0.5/0.5", "host", "device"]),
    memory=st.sampled_from(["unified", "apart", "apart, host attends"]),
    unit=st.sampled_from([1, 3, 8]),
    share=st.sampled_from([1, 3, 8]),
    stage=st.sampled_from([ALIGNMENT, 3 * ALIGNMENT, 1 << 20]),
    all_needs=st.lists(needs(), min_size=1, max_size=8),
    slots=st.integers(1, 4),
)
@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_attention_is_given_what_was_appended(
    data: st.DataObject, form: str, kv: str, memory: str, unit: int, share: int, stage: int,
    all_needs: list[SequenceNeed], slots: int, tmp_path: Path,
) -> None:  # fmt: skip
    """Sequences come and go at random, within a budget of exactly the plan's bytes."""
    policy = Policy.parse(f"kv={kv},kv_quant={form},device_batch={slots},num_device_batches=1")
    with units(unit * ALIGNMENT, share, stage):
        bench = Bench(policy, all_needs, memory == "unified", tmp_path, memory == "apart, host attends")
        waiting = list(all_needs)
        free = list(range(slots))
        while waiting or bench.admitted:
            while waiting and free:
                bench.admit(free.pop(0), waiting.pop(0))
            bench.run_pass()
            for sequence in list(bench.admitted):
                done = len(sequence.rows[0])
                if done >= sequence.capacity or data.draw(st.integers(0, 15)) == 0:
                    bench.leave(sequence)
                    free.append(sequence.slot)
        bench.close()


@pytest.mark.parametrize("form", ["16", "4", "4-channel-g8/4"])
def test_batches_decode_at_once_where_tokens_are_kept_one_by_one(form: str, tmp_path: Path) -> None:
    if not native.available():
        pytest.skip("addresses are for the compiled kernels")
    policy = Policy.parse(f"kv=0.5/0/0.5,kv_quant={form},device_batch=4,num_device_batches=1")
    needs = [SequenceNeed(9, 40)] * 4
    bench = Bench(policy, needs, True, tmp_path)
    for slot, need in enumerate(needs):
        bench.admit(slot, need)
    for _ in range(12):
        bench.run_pass()
    assert (bench.at_once > 4) == (form != "4-channel-g8/4")
    for sequence in list(bench.admitted):
        bench.leave(sequence)
    bench.close()


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("form", ["16", "4-channel-g8/4+5"])
def test_the_disk_sees_whole_units_only_and_nothing_twice(
    unified: bool, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 60 tokens and 100 more, on disk: writes and reads per pass, and the last pass."""
    reads: list[tuple[int, Tensor]] = []
    writes: list[tuple[int, Tensor]] = []
    real_read, real_write = DiskFile.read_many, DiskFile.write_many

    def read(self: DiskFile, pieces: Seq[tuple[int, Tensor]]) -> int:
        reads.extend(pieces)
        return real_read(self, pieces)

    def write(self: DiskFile, pieces: Seq[tuple[int, Tensor]]) -> int:
        writes.extend(pieces)
        return real_write(self, pieces)

    monkeypatch.setattr(DiskFile, "read_many", read)
    monkeypatch.setattr(DiskFile, "write_many", write)
    policy = Policy.parse(f"kv=disk,kv_quant={form},device_batch=1,num_device_batches=1")
    bench = Bench(policy, [SequenceNeed(60, 160)], unified, tmp_path)
    sequence = bench.admit(0, SequenceNeed(60, 160))
    layout = bench.plan.kv_slot
    quiet = 0
    for number in range(101):
        before, after = len(sequence.rows[0]), len(sequence.rows[0]) + sequence.fresh
        reads.clear()
        writes.clear()
        bench.run_pass()
        for offset, tensor in reads + writes:
            assert offset % ALIGNMENT == tensor.data_ptr() % ALIGNMENT == len(tensor) % ALIGNMENT == 0
        on_disk = [layout.written(layer, before) for layer in range(2)]
        assert sorted(len(into) for _, into in reads) == sorted(filter(None, on_disk)), "one piece per layer"
        if number == 100:
            assert writes == [], "nothing of a sequence's last pass is read again"
            break
        grown = [layout.written(layer, after) - on_disk[layer] for layer in range(2)]
        assert sorted(len(source) for _, source in writes) == sorted(filter(None, grown))
        quiet += not writes
    total = sum(layout.written(layer, 159) for layer in range(2))
    assert total > 0 and quiet > 60, "a pass that fills no unit writes nothing"
    bench.close()


def test_seats_on_disk_share_one_file_that_is_made_once(tmp_path: Path) -> None:
    policy = Policy.parse("kv=disk,device_batch=4,num_device_batches=1")
    bench = Bench(policy, [SequenceNeed(50, 100)] * 9, True, tmp_path)
    files = list(tmp_path.rglob("*.bin"))
    assert [path.stat().st_size for path in files] == [4 * bench.plan.kv_slot.nbytes]
    held = dict(bench.tiers.ledger.held)
    for _ in range(2):
        sequences = [bench.admit(slot, SequenceNeed(50, 100)) for slot in range(4)]
        assert bench.tiers.ledger.held == held and list(tmp_path.rglob("*.bin")) == files
        for sequence in sequences:
            bench.leave(sequence)
    bench.close()
    assert not files[0].exists()


@given(
    key=st.integers(1, 5000), value=st.integers(1, 5000), capacity=st.integers(1, 3000),
    form=st.sampled_from(FORMATS), size=st.sampled_from([2, 4]),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
def test_units_are_aligned_large_and_a_small_part(
    key: int, value: int, capacity: int, form: str, size: int
) -> None:
    layer = KVLayer(key, value, None if form == "16" else KVFormat.parse(form), size)
    buffer_index = KVSlot((layer, layer), capacity)
    whole = layer.data_bytes(capacity)
    for index, unit in enumerate(buffer_index.units):
        assert unit % ALIGNMENT == 0
        assert unit == ALIGNMENT or unit <= whole / 8
        assert unit == 128 << 10 or whole / 8 < unit + ALIGNMENT
        assert buffer_index.begins[index] % ALIGNMENT == 0
        assert buffer_index.begins[index + 1] - buffer_index.begins[index] >= whole
        for tokens in range(0, capacity + 1, max(1, capacity // 7)):
            rest = layer.data_bytes(tokens) - buffer_index.written(index, tokens)
            assert 0 <= rest < unit
            assert rest <= buffer_index.tail_rows_begin(index) - buffer_index.tail_begins[index]
            capacity_left = buffer_index.tail_begins[index + 1] - buffer_index.tail_rows_begin(index)
            assert layer.loose_tokens(tokens) * layer.row_bytes <= capacity_left
