"""Overheads of passes beside arithmetic, from real passes over a small model that fits no cache.

Between its calls a pass finds caches that hold weights, and not what the interpreter left there; so does this
one. The trace tells what each stage took; differences between blocks, depths and ways of keeping the KV cache
tell what belongs to a pass, a device batch, a layer, a sequence. Knows OPT alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from engine.memory.disk.aligned import empty_aligned
from engine.memory.storage import Tiers
from engine.memory.transfer import Stream
from engine.memory.weights.table_rows import read_rows
from engine.profiling.layers import config_of
from engine.profiling.links import scratch_file
from engine.profiling.passes import random_engine
from engine.profiling.products import multiply, pool_of, random_rows, usual_form
from engine.profiling.timing import Timing, timed, wait_for
from engine.spec.rates import Overheads
from engine.spec.request import Request
from engine.trace import Span, Trace
from engine.units import KIB, MIB

VOCABULARY, SHALLOW, DEEP = 512, 4, 12
FEW, MANY = 1, 16
_PAUSE, _PAUSES = 0.004, 60
"""Seconds for which streams let computation wait, about those of reading a layer; how often that is tried."""

_WARM_UP = 2


def matrices(hidden: int) -> list[tuple[int, int]]:
    """Outputs and inputs of the products of one layer of the small model."""
    return [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]


@dataclass(frozen=True)
class PassTimes:
    """Mean seconds of the parts of a pass."""

    embed: float
    layer: float
    head: float
    between: float
    """What is not computing of any stage: schedule, accounting, waiting."""

    kv_in: float
    kv_out: float
    """Of one step that brings or keeps a device batch's KV cache at one layer; 0 where none does."""


@dataclass(frozen=True)
class SmallModel:
    """Runs a small model of a width on a device."""

    device: str
    offload_dir: Path
    passes: int
    hidden: int
    slowness: Callable[[], float]
    """How many times as long as it should have the machine takes now."""

    def decoding(
        self, sequences: int, layers: int = DEEP, policy: str = "kv=device", passes: int | None = None
    ) -> PassTimes:
        """Parts of passes in which ``sequences`` of one device batch decode."""
        count = self.passes if passes is None else min(passes, self.passes)
        trace, slow = self._run(1, count + 1 + _WARM_UP, sequences, layers, policy)
        return pass_times(passes_of(trace)[1 + _WARM_UP :], layers, slow)

    def prompting(self, sequences: int, layers: int = DEEP) -> PassTimes:
        """The same where every sequence of every pass computes a prompt of one token, which is kept."""
        trace, slow = self._run(self.passes + _WARM_UP, 2, sequences, layers, "kv=device")
        return pass_times(passes_of(trace)[2 * _WARM_UP :: 2], layers, slow)

    def _run(self, rounds: int, tokens: int, sequences: int, layers: int, policy: str) -> tuple[Trace, float]:
        config = config_of(self.hidden, layers, VOCABULARY)
        shaped = f"{policy},device_batch={sequences},num_device_batches=1"
        with random_engine(self.device, self.offload_dir, config, shaped) as engine:
            before = self.slowness()
            engine.answer([Request((5,), tokens)] * sequences * rounds)
            return engine.trace, (before + self.slowness()) / 2


def passes_of(trace: Trace) -> list[list[Span]]:
    """The spans of each pass, in the order in which they began."""
    passes: list[list[Span]] = []
    spans = sorted(trace.spans, key=lambda span: span.begin)
    for span in spans:
        if span.what == "compute 0.0":
            passes.append([])
        if passes:
            passes[-1].append(span)
    return passes


def pass_times(passes: Sequence[Sequence[Span]], layers: int, slow: float = 1.0) -> PassTimes:
    """Mean times of passes of one device batch; the last one, whose end is not known, is left out.

    Args:
        slow: how many times as long as it should have the machine took.
    """
    found: dict[str, list[float]] = {field.name: [] for field in fields(PassTimes)}
    for spans, following in itertools.pairwise(passes):
        compute = [span for span in spans if span.stream == "compute"]
        seconds = [span.end - span.begin for span in compute]
        found["embed"].append(seconds[0])
        found["layer"] += seconds[1 : 1 + layers]
        found["head"].append(seconds[-1])
        found["between"].append(following[0].begin - spans[0].begin - sum(seconds))
        for stream in ("kv_in", "kv_out"):
            found[stream] += [span.end - span.begin for span in spans if span.stream == stream]
    return PassTimes(
        **{name: Timing.of(times).seconds / slow if times else 0.0 for name, times in found.items()}
    )


def measure_overheads(small: SmallModel, tiers: Tiers, known: Mapping[int, float]) -> Overheads:
    """Measure all overheads.

    Args:
        known: seconds of one layer's and the head's products of the small model by rows, which other rates of
            the profile account for; by 0 those of the head.
    """
    few, many = small.decoding(FEW), small.decoding(MANY)
    shallow = small.decoding(FEW, SHALLOW)
    prompts = small.prompting(FEW), small.prompting(MANY)
    loose = [small.decoding(count, policy="kv=device,kv_quant=kivi") for count in (FEW, MANY)]
    # Contexts are so short that nothing of them is on the disk yet: steps that move nothing.
    moved = [small.decoding(count, policy="kv=disk", passes=4) for count in (FEW, MANY)]
    products = known[MANY] - known[FEW]

    def each(first: float, last: float, less: float = 0.0) -> float:
        return max(0.0, (last - first - less) / (MANY - FEW))

    per_decode = each(few.layer, many.layer, products)
    per_embed_layer = max(0.0, (few.embed - shallow.embed) / (DEEP - SHALLOW))
    per_sequence = each(few.between, many.between) + each(few.head, many.head) + each(few.embed, many.embed)
    host = 0.0
    if not tiers.unified:
        beside = small.decoding(FEW, policy="kv=host,host_attention=on")
        host = max(0.0, beside.layer - few.layer)
    return Overheads(
        per_pass=max(0.0, few.between - each(few.between, many.between)),
        per_sequence=per_sequence,
        per_step=_step(tiers),
        per_wait=_wait(tiers),
        per_embed=max(0.0, few.embed - DEEP * per_embed_layer),
        per_embed_layer=per_embed_layer,
        per_layer=max(0.0, few.layer - known[FEW] - per_decode),
        per_prompt=each(prompts[0].layer, prompts[1].layer, products),
        per_decode=per_decode,
        per_loose=each(loose[0].layer, loose[1].layer, products),
        per_moved=(each(moved[0].kv_in, moved[1].kv_in) + each(moved[0].kv_out, moved[1].kv_out)) / 2,
        per_host_attention=host,
        per_head=max(0.0, few.head - known[0]),
        per_table_row=_table_row(tiers),
    )


def _step(tiers: Tiers) -> float:
    """Seconds to hand a job that does nothing to a stream that has paused, and wait for it."""
    seconds = []
    with closing(Stream("profile", Trace(), tiers.device)) as stream:
        for _ in range(_PAUSES):
            time.sleep(_PAUSE)
            begin = time.perf_counter()
            stream.submit("nothing", lambda: 0).wait()
            seconds.append(time.perf_counter() - begin)
    return Timing.of(seconds).seconds


@torch.inference_mode()
def _wait(tiers: Tiers, rows: int = 4) -> float:
    """Seconds by which products take longer after a wait for a stream than after other products."""
    turns = itertools.cycle(pool_of(usual_form(tiers.device), 512, 512, tiers.device))
    x = random_rows(rows, 512, tiers.device)

    def compute() -> float:
        begin = time.perf_counter()
        for _ in range(6):
            multiply(x, next(turns))
        wait_for(tiers.device)
        return time.perf_counter() - begin

    def pause() -> int:
        time.sleep(_PAUSE)
        return 0

    hot, waited = [], []
    with closing(Stream("profile", Trace(), tiers.device)) as stream:
        for _ in range(_PAUSES):
            stream.submit("pause", pause).wait()
            waited.append(compute())
            compute()
            hot.append(compute())
    return max(0.0, Timing.of(waited).seconds - Timing.of(hot).seconds)


def _table_row(tiers: Tiers, rows: int = 64, row_bytes: int = 2 * KIB) -> float:
    """Seconds per row of a table on disk, of which several are read together."""
    size = 32 * MIB
    places = torch.randint(size // row_bytes, (64, rows)).sort().values.tolist()
    turns = itertools.cycle(places)
    into = torch.empty(rows, row_bytes, dtype=torch.uint8)
    with scratch_file(tiers, size, empty_aligned(size).fill_(1)) as file:
        timing = timed(lambda: read_rows(file, 0, next(turns), into), 0.15, torch.device("cpu"), least=5)
    return timing.seconds / rows
