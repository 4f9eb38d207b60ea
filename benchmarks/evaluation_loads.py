"""Time of evaluation loads with shared prefixes and continuous batching, against FlexGen's batching.

    python -m benchmarks.evaluation_loads --work FOLDER

The requests are HELM's own for real run entries, encoded by the demo model's tokenizer; the model is an OPT
of published shape with random weights. As random weights do not know when to stop, the lengths of answers are
drawn, once for all modes, with the means that FlexGen's authors published for these scenarios. The modes
differ in the four keys of a policy that control batching; engine, model, block and budget are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, RepetitionLog
from benchmarks.script import run
from benchmarks.synthetic import checkpoint
from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Request
from harness.comparison.ratios import spread

DEMO = Path(__file__).resolve().parent.parent / "scenarios" / "demo" / "model"

MODES = {
    "shared": "prefix_sharing=on",
    "not shared": "prefix_sharing=off",
    "FlexGen's": "prefix_sharing=off,refill=off,early_leaving=off,padding=256",
}
"""Ways of batching requests; the first is compared with the others."""


@dataclasses.dataclass(frozen=True)
class EvaluationLoad:
    """The requests of a run entry, and the speed-up that is expected."""

    name: str
    entry: str
    mean_tokens: float | None
    """Mean length of the answers, published; None where nothing is generated."""

    bar: float
    """Min ratio of the other mode's time to the first one's."""

    against: str = "FlexGen's"
    """The other mode."""


LOADS = (
    EvaluationLoad("pattern_match", "synthetic_reasoning:mode=pattern_match", 14, 4),
    EvaluationLoad("natural", "synthetic_reasoning_natural:difficulty=easy", 9, 3),
    EvaluationLoad("multiple choice", "data_imputation:method=multiple_choice_separate_original", None, 6),
    EvaluationLoad("nothing shared", "synthetic_reasoning:mode=pattern_match", 14, 0.97, "not shared"),
)
"""In the last load all prompts differ from the first token on."""


def requests_of(
    load: EvaluationLoad, model: Path, work: Path, instances: int, trials: int, seed: int
) -> list[Request]:
    """HELM's requests for a run entry, with drawn lengths of answers."""
    from engine.spec.settings import EngineSettings
    from harness.suite import requests as suite_requests
    from harness.suite.options import SuiteOptions

    options = SuiteOptions(
        EngineSettings(str(model), weights="random", offload_dir=work / "offload"),
        model_name="opt", policies=[Policy()], suite=load.name.replace(" ", "_"),
        output_path=work / "suites", run_entries=[load.entry], max_eval_instances=instances,
        num_train_trials=trials, report=False,
    )  # fmt: skip
    found = suite_requests.requests_of(options)
    draw = random.Random(seed)
    result = []
    for index, request in enumerate(found):
        prompt = request.prompt
        if load.name == "nothing shared":
            first = (4 + index % 30_000, 4 + index // 30_000)
            prompt = (*first, *prompt[2:])
        stop = (
            None
            if load.mean_tokens is None
            else _after(_length(draw, load.mean_tokens, request.max_new_tokens))
        )
        result.append(dataclasses.replace(request, prompt=prompt, stop=stop, stop_token_ids=frozenset()))
    return result


def _length(draw: random.Random, mean: float, most: int) -> int:
    """Tokens of an answer: a geometric draw, cut off at the limit."""
    return min(most, 1 + int(math.log(1 - draw.random()) / math.log(1 - 1 / mean)))


def _after(tokens: int) -> Callable[[Sequence[int]], bool]:
    return lambda generated: len(generated) >= tokens


def measure(model: Path, mode: str, requests: Sequence[Request], block: str) -> dict[str, Any]:
    """Wall time of all passes, the savings and the peaks of memory."""
    batch, batches = block.split("x")
    text = f"device_batch={batch},num_device_batches={batches},{MODES[mode]}"
    with Engine(model, Policy.parse(text)) as engine:
        engine.answer(requests[:1])  # weights in place, kernels compiled, memory touched
        before = engine.record().totals
        engine.answer(requests)
        record = engine.record()
        seconds = record.totals.seconds - before.seconds
        kept = record.to_json()
        return {"seconds": seconds, "savings": kept["savings"], "peak": kept["memory"]}


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and suites")
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--block", default="32x2", help="sequences of a device batch, times device batches")
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[load.name for load in LOADS])
    parser.add_argument("--all-modes", action="store_true", help="also the mode that is not compared")
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "evaluation_loads")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = checkpoint(args.work, args.shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, model / name)
    log = RepetitionLog(
        args.output / "evaluation_loads.jsonl",
        ("load", "shape", "block", "instances", "trials", "mode", "repeat"),
    )
    for load in LOADS:
        if load.name not in args.only:
            continue
        requests = requests_of(load, model, args.work, args.instances, args.trials, seed=0)
        for repeat in range(args.repeats):
            modes = list(MODES) if args.all_modes else [next(iter(MODES)), load.against]
            order = modes if repeat % 2 == 0 else modes[::-1]
            for mode in order:
                row = {
                    "load": load.name, "shape": args.shape, "block": args.block, "instances": args.instances,
                    "trials": args.trials, "mode": mode, "repeat": repeat, "requests": len(requests),
                }  # fmt: skip
                if log.has(row):
                    continue
                row |= measure(model, mode, requests, args.block)
                log.add(row)
                print(f"{load.name}, {mode}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    table = to_table(log.rows)
    (args.output / "evaluation_loads.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds per mode and ratios of the same repetition, medians with their range, as Markdown."""
    lines = [
        "| load | requests | mode | seconds | times as long | computed tokens | computed / needed | padding "
        "| passes | slots taken | KV saved |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = next(iter(MODES))
    for load in LOADS:
        ours = {
            row["repeat"]: row["seconds"] for row in rows if (row["load"], row["mode"]) == (load.name, first)
        }
        for mode in MODES:
            found = [row for row in rows if (row["load"], row["mode"]) == (load.name, mode)]
            if not found:
                continue
            saved = found[0]["savings"]
            ratios = [row["seconds"] / ours[row["repeat"]] for row in found if row["repeat"] in ours]
            lines.append(
                f"| {load.name} | {found[0]['requests']} | {mode} | "
                f"{spread([row['seconds'] for row in found], 1)} | {spread(ratios)} | "
                f"{saved['computed_tokens']:,} | {saved['computed_per_needed']:.3f} | "
                f"{saved['padding_tokens']:,} | {saved['passes']} | {saved['occupancy']:.2f} | "
                f"{saved['kv_bytes_saved'] / 2**20:,.0f} MiB |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
