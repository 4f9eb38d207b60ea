"""What compression does for speed: decoding with resident weights, and throughput under a memory cap.

    python -m benchmarks.compression decode --model 1.3b --blocks 1 4 16 64
    python -m benchmarks.compression capped --model 350m --host-memory 1GiB

Weights are random, which is as fast as trained ones. The engines that are compared run in one process and
take turns, so that a noisy machine disturbs all of them; printed are the median and the range of the turns'
ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.synthetic import SHAPES, VOCABULARY, config_of, prompts
from engine.engine import Engine
from engine.errors import BudgetError
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.request import CallProgress, Request
from engine.units import format_bytes, parse_bytes

FORMATS = {
    "full precision": "weight_quant=16,kv_quant=16",
    "4-bit weights": "weight_quant=best4,kv_quant=16",
    "4-bit KV cache": "weight_quant=16,kv_quant=4",
    "4 bits": "weight_quant=best4,kv_quant=4",
    "FlexGen's format": "weight_quant=flexgen,kv_quant=flexgen",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("decode", "capped"):
        command = commands.add_parser(name)
        command.add_argument("--model", choices=SHAPES, default="1.3b" if name == "decode" else "350m")
        command.add_argument("--formats", nargs="+", choices=FORMATS, default=["full precision", "4 bits"])
        command.add_argument("--turns", type=int, default=5 if name == "decode" else 1)
        command.add_argument("--json", type=Path)
    commands.choices["decode"].add_argument("--blocks", nargs="+", type=int, default=[1, 4, 16, 64])
    commands.choices["decode"].add_argument("--prompt-len", type=int, default=4)
    commands.choices["decode"].add_argument("--gen-len", type=int, default=6)
    commands.choices["capped"].add_argument("--host-memory", type=parse_bytes, default="1GiB")
    commands.choices["capped"].add_argument("--prompt-len", type=int, default=512)
    commands.choices["capped"].add_argument("--gen-len", type=int, default=32)
    commands.choices["capped"].add_argument("--most", type=int, default=256, help="max sequences of a block")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compression-") as scratch:
        rows = (decode if args.command == "decode" else capped)(args, Path(scratch))
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": vars(args), "rows": rows}, indent=1, default=str), encoding="utf-8"
        )


def decode(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Seconds of a decoding pass over resident weights, formats in turn."""
    model = _model(args, scratch)
    rows = []
    engines = {
        name: Engine(
            model, Policy.parse(f"{FORMATS[name]},device_batch={max(args.blocks)},num_device_batches=1"),
            weights="random", device="cpu", offload_dir=scratch / "offload",
        )
        for name in args.formats
    }  # fmt: skip
    try:
        for block in args.blocks:
            requests = _requests(args, block)
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(args.turns):
                for name, engine in engines.items():
                    seconds[name].append(_pass_seconds(engine, requests))
            for name, taken in seconds.items():
                ratios = [a / b for a, b in zip(seconds[args.formats[0]], taken, strict=True)]
                rows.append({
                    "block": block, "format": name, "pass_seconds": statistics.median(taken),
                    "tokens_per_second": block / statistics.median(taken),
                    "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
                })  # fmt: skip
                print(
                    f"block {block:3}  {name:18} {rows[-1]['tokens_per_second']:8.2f} token/s"
                    f"   x {rows[-1]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True,
                )  # fmt: skip
    finally:
        for engine in engines.values():
            engine.close()
    return rows


def capped(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Generated tokens per second with the largest block that a memory cap allows, by format and place."""
    model = _model(args, scratch)
    rows = []
    for name in args.formats:
        for weights in ("device", "disk"):
            policy = Policy.parse(f"{FORMATS[name]},weights={weights},device_batch=16,max_batch_tokens=2048")
            with Engine(
                model, policy, weights="random", device="cpu", offload_dir=scratch / "offload",
                budgets=Budgets(host=args.host_memory),
            ) as engine:  # fmt: skip
                try:
                    block = min(args.most, engine.largest_block(args.prompt_len, args.gen_len))
                except BudgetError as error:
                    print(f"{name:18} weights on {weights:6} not run: {error}", flush=True)
                    continue
                size = min(block, 16)
                engine.policy = policy.replace(device_batch=size, num_device_batches=block // size)
                block = size * (block // size)
                for _ in range(args.turns):
                    begin = time.perf_counter()
                    engine.answer(_requests(args, block))
                    seconds = time.perf_counter() - begin - engine.record().totals.load_seconds
                    rows.append({
                        "format": name, "weights": weights, "block": block, "seconds": seconds,
                        "tokens_per_second": block * args.gen_len / seconds,
                        "record": engine.record().to_json(),
                    })  # fmt: skip
                    print(
                        f"{name:18} weights on {weights:6} block {block:4}  {seconds:7.1f} s  "
                        f"{rows[-1]['tokens_per_second']:7.2f} generated token/s  "
                        f"(cap {format_bytes(args.host_memory)})", flush=True,
                    )  # fmt: skip
    return rows


def _pass_seconds(engine: Engine, requests: Sequence[Request]) -> float:
    """Median seconds of a pass that only decodes."""
    ends: list[float] = []

    def note(progress: CallProgress) -> None:
        if progress.pass_done == 1 and progress.loaded == 1:
            ends.append(time.perf_counter())

    engine.answer(requests, on_progress=note)
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def _model(args: argparse.Namespace, scratch: Path) -> Path:
    folder = scratch / "model"
    config_of(args.model).save_pretrained(folder)
    return folder


def _requests(args: argparse.Namespace, count: int) -> list[Request]:
    return [Request(prompt, args.gen_len) for prompt in prompts(count, args.prompt_len, VOCABULARY)]


if __name__ == "__main__":
    main()
