#!/usr/bin/env python
"""Makes a Markdown table and a picture from the JSON lines of limits.py.

python benchmarks/limits_report.py                       # results/limits/limits.jsonl
python benchmarks/limits_report.py a.jsonl b.jsonl --out elsewhere
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cells import LOADS, SETTINGS, LoadShape, block_of
from benchmarks.records import RESULTS, Repetition, markdown, read_rows
from harness.comparison.ratios import spread

HEADER = (
    "model", "setting", "load", "run, bound / time", "block",
    "prefill, bound / time", "block", "decode, bound / time", "block", "stream", "least of all blocks",
    "with attention after products", "token/s, projected",
)  # fmt: skip
GOOD, LEAST = 0.85, 0.7
IMPOSSIBLE, STEADY = 1.05, 1.25
_RATES = {"compute": "layers", "memory": "memory", "disk read": "disk_read", "disk write": "disk_write"}
_COLOURS = {"prefill": "#c05a1c", "decode": "#1f5fa8"}


@dataclass
class PassKind:
    """One kind of pass: the repetitions at the block with the best median, and the least of all blocks."""

    block: str = "-"
    rows: list[Repetition] = field(default_factory=list)
    least: float = float("nan")

    @property
    def ratios(self) -> list[float]:
        """Bound / time of every repetition."""
        return [row["ratio"] for row in self.rows]

    @property
    def in_order(self) -> list[float]:
        """The same for the bound in which the cores compute products and attention one after the other."""
        return [row["in_order_ratio"] for row in self.rows]


@dataclass(frozen=True)
class WholeRun:
    """A whole run with one block: its prefill pass and its decode passes together."""

    ratio: float = float("nan")
    block: str = "-"


@dataclass
class LimitsRow:
    """One model, setting and load."""

    model: str
    setting: str
    load: LoadShape
    run: WholeRun
    prefill: PassKind
    decode: PassKind

    def line(self) -> list[str]:
        """The cells of its line in the table."""
        streams = dict.fromkeys(row["stream"] for row in (*self.prefill.rows[:1], *self.decode.rows[:1]))
        least = [f"{kind.least:.2f}" if kind.rows else "-" for kind in (self.prefill, self.decode)]
        return [
            self.model, self.setting, self.load.name,
            f"{self.run.ratio:.2f}", self.run.block,
            spread(self.prefill.ratios), self.prefill.block,
            spread(self.decode.ratios), self.decode.block,
            ", ".join(streams), " / ".join(least),
            " / ".join(spread(kind.in_order).split(" ")[0] for kind in (self.prefill, self.decode)),
            self.projected(),
        ]  # fmt: skip

    def projected(self) -> str:
        """Generated token/s of a whole run, projected from a prefill pass and decode passes at its contexts.

        If they were measured at different blocks, the prefill time is scaled by the number of sequences.
        """
        if not self.prefill.rows or not self.decode.rows:
            return "-"
        first = statistics.median(row["seconds"][0] for row in self.prefill.rows)
        batch, batches = block_of(self.decode.block)
        count = batch * batches
        first *= count / self.prefill.rows[0]["sequences"]
        step = statistics.mean(statistics.median(row["seconds"]) for row in self.decode.rows)
        return f"{count * self.load.generate / (first + (self.load.generate - 1) * step):,.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it and the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS / "limits.jsonl"])
    parser.add_argument("--out", type=Path, help="folder of limits.md, .svg and .png; that of the first file")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.files if not path.exists()]
    if missing:
        print(f"error: {', '.join(missing)} does not exist: run benchmarks/limits.py first", file=sys.stderr)
        return 2
    rows = read_rows(options.files)
    cells = list(cells_of(rows))
    folder: Path = options.out or options.files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    text = report(cells, rows)
    (folder / "limits.md").write_text(text, encoding="utf-8")
    print(text)
    if any(cell.prefill.rows or cell.decode.rows for cell in cells):
        draw(cells, folder / "limits")
    return 0


def cells_of(rows: Sequence[Repetition]) -> Iterable[LimitsRow]:
    """Every model, setting and load with a measurement."""
    models = dict.fromkeys((row["shape"], row.get("layers")) for row in rows)
    for shape, layers in models:
        name = f"OPT {shape}" + (f", {layers} layers" if layers else "")
        for setting in SETTINGS:
            here = [
                row for row in rows
                if (row["shape"], row.get("layers"), row["setting"]) == (shape, layers, setting)
            ]  # fmt: skip
            for load in LOADS:
                found = [row for row in here if row.get("prompt") == load.prompt and "ratio" in row]
                if found:
                    kinds = kind_of(found, "prefill"), kind_of(found, "decode")
                    yield LimitsRow(name, setting, load, run_of(found, load), *kinds)


def run_of(rows: Sequence[Repetition], load: LoadShape) -> WholeRun:
    """The run with the best ratio, over the blocks whose decode passes were measured.

    A run's bound is that of the stream with the most work over all of its passes: one stream's work in
    prefill cannot hide another's in decoding. Where a block's own prefill took too long to be measured, that
    of a smaller block is counted several times: this takes no less time, and only arithmetic is multiplied.
    """
    best = WholeRun()
    for variant, block in dict.fromkeys((row["variant"], row["block"]) for row in rows):
        same = [row for row in rows if row["variant"] == variant]
        decodes = [row for row in same if row["kind"] == "decode" and row["block"] == block]
        contexts = sorted({row["context"] for row in decodes} & set(load.contexts))
        count = math.prod(block_of(block))
        sizes = {row["sequences"] for row in same if row["kind"] == "prefill" and row["sequences"] <= count}
        if not sizes or not contexts:
            continue
        size = max(sizes)
        first = [row for row in same if row["kind"] == "prefill" and row["sequences"] == size]
        each = (load.generate - 1) / len(contexts)
        parts = [(count / size, 1.0, first)]
        parts += [(each, each, [row for row in decodes if row["context"] == context]) for context in contexts]
        seconds, streams = 0.0, dict.fromkeys(first[0]["streams"], 0.0)
        for times, others, group in parts:
            seconds += times * statistics.median(statistics.median(row["seconds"]) for row in group)
            for stream in streams:
                often = times if stream == "compute" else others
                streams[stream] += often * statistics.median(row["streams"][stream] for row in group)
        ratio = max(streams.values()) / seconds
        if not best.ratio >= ratio:
            best = WholeRun(ratio, block)
    return best


def kind_of(rows: Sequence[Repetition], kind: str) -> PassKind:
    """The best block for one kind of pass, over the variants of a setting."""
    groups: dict[tuple[str, str], list[Repetition]] = {}
    for row in rows:
        if row["kind"] == kind:
            groups.setdefault((row["variant"], row["block"]), []).append(row)
    if not groups:
        return PassKind()
    medians = {key: statistics.median(row["ratio"] for row in group) for key, group in groups.items()}
    most = max(len(group) for group in groups.values())
    repeated = [key for key in groups if len(groups[key]) == most]  # the sweep's best, which was repeated
    best = max(repeated, key=lambda key: medians[key])
    same = [value for key, value in medians.items() if key[0] == best[0]]
    return PassKind(best[1], groups[best], min(same))


def report(cells: Sequence[LimitsRow], rows: Sequence[Repetition]) -> str:
    """The table, and the notes for reading it."""
    measured = [row for row in rows if "ratio" in row]
    repeats = 1 + max((row["repeat"] for row in measured), default=0)
    cold = sorted({row["cold"] for row in measured})
    known = {_skipped_key(row) for row in measured}
    skipped = [row for row in rows if ("skipped" in row or "why" in row) and _skipped_key(row) not in known]
    good = [kind for cell in cells for kind in (cell.prefill, cell.decode) if kind.rows]
    above = sum(GOOD <= statistics.median(kind.ratios) <= IMPOSSIBLE for kind in good)
    beyond = sum(row["ratio"] > IMPOSSIBLE for row in measured)
    unsteady = sum(_unsteady(row) for row in measured)
    least = sum(kind.least >= LEAST for kind in good)
    whole = sum(GOOD <= cell.run.ratio <= IMPOSSIBLE for cell in cells)
    lines = [
        f"Median (least to most) of up to {repeats} repetitions on {', '.join(_machines(measured))}.",
        f"Page cache before every repetition and after every pass: {', '.join(cold)}.",
        f"Whole runs, composed of passes with one block: at least {GOOD} in {whole} of {len(cells)}. "
        f"Single kinds of pass: at least {GOOD} with the best block in {above} of {len(good)}, at least "
        f"{LEAST} with every block in {least}.",
        f"A ratio above {IMPOSSIBLE} means that a stream alone was measured too slow, and does not count: "
        f"{beyond} of {len(measured)} repetitions. In {unsteady} the stream that sets the bound changed "
        f"by more than {STEADY} times from before to after.",
        "Token/s are projected from single passes, not measured over whole runs.",
        "",
        markdown(HEADER, (cell.line() for cell in cells)),
    ]
    if skipped:
        lines.append("Not measured:\n")
        lines += [f"- {line}" for line in dict.fromkeys(_skipped(row) for row in skipped)]
    return "\n".join(lines) + "\n"


def _machines(rows: Sequence[Repetition]) -> list[str]:
    return list(dict.fromkeys(row["machine"] for row in rows))


def _unsteady(row: Repetition) -> bool:
    """Whether the rate of the stream that sets a repetition's bound changed from before to after it."""
    rates = [row[when][_RATES[row["stream"]]] for when in ("before", "after")]
    return max(rates) > STEADY * min(rates)


def _skipped_key(row: Repetition) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("shape", "layers", "variant", "kind", "prompt", "context", "block"))


def _skipped(row: Repetition) -> str:
    what = f"{row.get('kind')} {row.get('prompt', '')} block {row.get('block', '')}"
    return f"OPT {row['shape']}, {row['variant']}, {what}: {row.get('skipped') or row.get('why')}"


def draw(cells: Sequence[LimitsRow], path: Path) -> None:
    """A point per cell and kind of pass, with its spread, as SVG and PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.3 * len(cells)), layout="constrained")
    for place, cell in enumerate(cells):
        for shift, (name, kind) in ((-0.13, ("prefill", cell.prefill)), (0.13, ("decode", cell.decode))):
            if not kind.rows:
                continue
            middle = statistics.median(kind.ratios)
            error = [[middle - min(kind.ratios)], [max(kind.ratios) - middle]]
            label = name if name not in axes.get_legend_handles_labels()[1] else None
            axes.errorbar(
                middle, place + shift, xerr=error, fmt="o", ms=5, lw=1.5, capsize=2,
                color=_COLOURS[name], label=label,
            )  # fmt: skip
    axes.axvline(1, color="black", lw=1)
    axes.axvline(GOOD, color="grey", lw=1, ls="--")
    axes.axvline(LEAST, color="grey", lw=1, ls=":")
    axes.set_yticks(range(len(cells)), [f"{c.model}, {c.setting}, {c.load.name}" for c in cells], fontsize=8)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("physical bound / measured time of a pass (dashed 0.85, dotted 0.7)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
