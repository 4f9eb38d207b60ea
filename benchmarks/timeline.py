#!/usr/bin/env python
"""Draws passes from the engine's trace: one row per stream, a bar per job, time from left to right.

    python benchmarks/timeline.py --shape 1.3b --block 16 --out docs/timeline
    python benchmarks/timeline.py --quick --out /tmp/timeline

Writes an SVG and a PNG. What is drawn was measured; nothing is smoothed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.overlap import DEMO
from benchmarks.page_cache import drop
from benchmarks.passes import past_filled, set_block, timed
from benchmarks.records import RESULTS
from benchmarks.synthetic import checkpoint, own_store, prompts
from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Request
from engine.trace import STREAMS, Span

LABELS = {
    "compute": "compute", "weights": "weights in", "kv_in": "KV and hidden in", "kv_out": "KV and hidden out",
}  # fmt: skip
COLOURS = {
    "compute": "#2f6db3",
    "load weights": "#d9822b",
    "load KV": "#4f9d69",
    "load hidden": "#9bc7a7",
    "store KV": "#a3588f",
    "store hidden": "#d3a8c7",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a few passes and draw the middle one; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="1.3b", help="125m, 1.3b, 6.7b, or demo")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--policy", default="weights=disk,kv=host")
    parser.add_argument("--block", type=int, default=16, metavar="N", help="sequences of a device batch")
    parser.add_argument("--batches", type=int, default=1, metavar="N", help="device batches")
    parser.add_argument(
        "--context", type=int, default=128, help="tokens in the KV cache when decoding begins"
    )
    parser.add_argument(
        "--passes", type=int, default=1, metavar="N", help="number of passes to draw, one after another"
    )
    parser.add_argument("--quick", action="store_true", help="the 125M shape, 4 sequences")
    parser.add_argument("--work", type=Path, default=Path("results/offload/overlap"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS / "timeline", help="without suffix")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.block = "125m", 4
    model = DEMO if options.shape == "demo" else checkpoint(options.work, options.shape, options.layers)
    offload = options.work / "offload"
    cold = [model, offload, own_store(options.work)]
    policy = Policy.parse(options.policy)
    with Engine(model, policy, offload_dir=offload) as engine:
        set_block(engine, options.block, options.batches, options.context + 1, filled=True)
        ids = prompts(options.block * options.batches, options.context + 1, engine.spec.vocab_size)
        drop(cold, everything=False)
        with past_filled():
            timed(engine, [Request(prompt, options.passes + 3) for prompt in ids], cold)
        spans = passes_of(engine.trace.spans)[2 : 2 + options.passes]
        name = options.shape if options.layers is None else f"{options.shape}, {options.layers} layers"
        title = (
            f"OPT {name}, {policy.schedule} walk, {options.policy}, "
            f"{options.batches} x {options.block} sequences at {options.context} tokens"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw([span for part in spans for span in part], title, options.out)
    print(f"{options.out}.svg and .png: {len(spans)} pass, {sum(map(len, spans))} jobs")
    return 0


def passes_of(spans: Sequence[Span]) -> list[list[Span]]:
    """The jobs of each pass; a pass begins where its first stage is computed."""
    starts = sorted(span.begin for span in spans if span.what == "compute 0.0")
    edges = [*starts, float("inf")]
    return [
        [span for span in spans if span.end > begin and span.begin < end]
        for begin, end in itertools.pairwise(edges)
    ]


def draw(spans: Sequence[Span], title: str, path: Path) -> None:
    """Write the picture as SVG and PNG; spans are clipped at its edges."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    computing = [span for span in spans if span.stream == "compute"]
    zero, end = min(span.begin for span in computing), max(span.end for span in computing)
    # A stream whose jobs have nothing to move is not shown.
    streams = [stream for stream in STREAMS if stream == "compute" or _busy(spans, stream, zero, end) > 1e-3]
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.62 * len(streams)), layout="constrained")
    seen: dict[str, str] = {}
    for span in spans:
        if span.stream not in streams:
            continue
        operation, _, place = span.what.rpartition(" ")
        begin, stop = max(span.begin, zero), min(span.end, end)
        if stop <= begin:
            continue
        colour = seen[operation] = COLOURS.get(operation, "#888888")
        row = streams.index(span.stream)
        axes.barh(
            row, (stop - begin) * 1e3, left=(begin - zero) * 1e3, height=0.72, color=colour,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        stage = place.partition(".")[0]
        if (stop - begin) > 0.022 * (end - zero):
            middle = ((begin + stop) / 2 - zero) * 1e3
            axes.text(middle, row, stage, ha="center", va="center", color="white", fontsize=7)
    shares = [_busy(spans, stream, zero, end) / (end - zero) for stream in streams]
    names = [f"{LABELS[stream]}\n{share:.0%} busy" for stream, share in zip(streams, shares, strict=True)]
    axes.set_yticks(range(len(streams)), names, fontsize=9)
    axes.set_ylim(len(streams) - 0.5, -0.5)
    axes.set_xlim(0, (end - zero) * 1e3)
    axes.set_xlabel("ms since the pass began; numbers are stages, the first of which is the embedding")
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    patches = [Patch(color=colour, label=operation) for operation, colour in seen.items()]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=9)
    for suffix in ("svg", "png"):
        figure.savefig(f"{path}.{suffix}", dpi=130)
    pyplot.close(figure)


def _busy(spans: Sequence[Span], stream: str, zero: float, end: float) -> float:
    """Seconds between two points in time during which a stream is busy."""
    inside = (min(span.end, end) - max(span.begin, zero) for span in spans if span.stream == stream)
    return sum(part for part in inside if part > 0)


if __name__ == "__main__":
    sys.exit(main())
