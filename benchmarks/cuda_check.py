#!/usr/bin/env python
"""Check the engine on a CUDA machine and measure a small throughput table.

    python benchmarks/cuda_check.py
    python benchmarks/cuda_check.py --shape 6.7b --device-memory 8GiB --prompt-len 512 --gen-len 32
    python benchmarks/cuda_check.py --device pretend        # the same code without a GPU

Needs a checkout and torch, transformers, safetensors, accelerate and numpy; no HELM, no pytest.
Exit code 0: everything is equal. 1: an answer differs. 2: the device or an argument cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from engine.spec.hardware import Budgets
    from engine.spec.request import CallProgress

POLICIES = {
    "resident": "weights=device",
    "weights on host": "weights=host",
    "weights and KV on host": "weights=host,kv=host",
    "half of all on host": "weights=0.5/0.5/0,kv=0.5/0.5/0",
    "4 bits on host": "weights=host,kv=host,weight_quant=4,kv_quant=4",
    "weights on disk": "weights=disk,kv=host",
    "4 bits on disk": "weights=disk,kv=host,weight_quant=4,kv_quant=4",
}
HEADER = ["policy", "gen token/s", "total token/s", "seconds", "load s", "device GiB", "host GiB", "disk GiB"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} sees no CUDA device; run this where there is one, "
            "or try the same code with --device pretend or --device cpu",
            file=sys.stderr,
        )
        return 2
    from engine.errors import TierbenchError
    from engine.machine import hardware, software

    try:
        device = torch.device("cpu" if options.device == "pretend" else options.device)
        result: dict[str, Any] = {
            "kind": "measured",
            "hardware": hardware(device, pretend=options.device == "pretend"),
            "software": software(),
        }
        print(
            f"device {result['hardware']['device']}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}"
        )
        equal = options.skip_equality or _equality(options, result)
        if not options.skip_throughput:
            _throughput(options, result)
    except (TierbenchError, ValueError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {options.json}")
    return 0 if equal else 1


def _equality(options: argparse.Namespace, result: dict[str, Any]) -> bool:
    from benchmarks.equality import FAMILIES, TOLERANCE, checks, full_precision

    full_precision()
    families = options.families.split(",") if options.families else FAMILIES
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise ValueError(f"unknown family {sorted(unknown)[0]!r}: use {', '.join(FAMILIES)}")
    print(
        f"\nequality in float32, {len(families)} families: the engine against transformers, "
        "and at 4 bits against the engine on the CPU"
    )
    done = []
    for family in families:
        mine = []
        for check in checks(options.device, family, options.offload_dir):
            mine.append(check)
            if not check.passed:
                print(
                    f"  DIFFERS  {family}: {check.what}: worst |d log p| {check.worst:.2g} "
                    f"(tolerance {check.tolerance:g}), {check.wrong_tokens} answers with other tokens"
                )
        good, exact = sum(check.passed for check in mine), [c.worst for c in mine if c.tolerance == TOLERANCE]
        print(f"  {family:12} {good} of {len(mine)} equal, worst |d log p| {max(exact):.2g}", flush=True)
        done += mine
    result["equality"] = [{**asdict(check), "passed": check.passed} for check in done]
    failed = sum(not check.passed for check in done)
    print(f"{len(done) - failed} of {len(done)} comparisons are equal")
    return not failed


def _throughput(options: argparse.Namespace, result: dict[str, Any]) -> None:
    from benchmarks.synthetic import SHAPES, TINY
    from engine.spec.hardware import Budgets
    from engine.units import parse_bytes

    if options.shape not in (*SHAPES, TINY):
        raise ValueError(f"unknown shape {options.shape!r}: use {', '.join(SHAPES)}")
    given = {"device": options.device_memory, "host": options.host_memory, "disk": options.disk}
    budgets = Budgets(**{name: parse_bytes(text) for name, text in given.items() if text})
    names = options.policies.split(",") if options.policies else list(POLICIES)
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise ValueError(f"unknown policy {unknown[0]!r}: use {', '.join(POLICIES)}")
    count = options.device_batch * options.num_device_batches
    print(
        f"\nOPT-{options.shape} with random weights: {count} prompts of {options.prompt_len} tokens, "
        f"{options.gen_len} to generate"
    )
    print("  ".join(f"{title:>13}" if place else f"{title:24}" for place, title in enumerate(HEADER)))
    result["workload"] = {
        name: getattr(options, name)
        for name in ("shape", "prompt_len", "gen_len", "device_batch", "num_device_batches")
    }
    result["throughput"] = []
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=options.offload_dir) as scratch:
        for name in names:
            row = _answered(options, name, budgets, Path(scratch))
            result["throughput"].append(row)
            cells = _cells(row)
            wide = len(cells) == len(HEADER)
            texts = (f"{cell:>13}" if at and wide else f"{cell:24}" for at, cell in enumerate(cells))
            print("  ".join(texts), flush=True)


def _answered(options: argparse.Namespace, name: str, budgets: Budgets, scratch: Path) -> dict[str, Any]:
    """The workload's record under one policy; a policy that does not fit has an error instead."""
    from benchmarks.synthetic import config_of, prompts
    from engine import Engine, Policy, Request
    from engine.errors import TierbenchError
    from engine.units import format_seconds

    def note(progress: CallProgress) -> None:
        if sys.stderr.isatty():
            left = format_seconds(progress.eta_seconds)
            print(f"\r{name}: {progress.generated_tokens} tokens, {left} left   ", end="", file=sys.stderr)

    config = config_of(options.shape)
    config.max_position_embeddings = max(2048, options.prompt_len + options.gen_len)
    config.save_pretrained(scratch / "model")
    block = f"device_batch={options.device_batch},num_device_batches={options.num_device_batches}"
    policy = Policy.parse(f"{POLICIES[name]},{block}").replace(name=name)
    row: dict[str, Any] = {"policy": name, "error": None, "record": None}
    try:
        with Engine(
            scratch / "model", policy, budgets=budgets, device=options.device, weights="random",
            offload_dir=scratch / "offload",
        ) as engine:  # fmt: skip
            count = options.device_batch * options.num_device_batches
            ids = prompts(count, options.prompt_len, engine.spec.vocab_size)
            engine.answer([Request(prompt, options.gen_len) for prompt in ids], on_progress=note)
            row["record"] = engine.record().to_json()
    except TierbenchError as error:
        row["error"] = str(error)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    """A row as printed: policy, generated and total token/s, seconds, peak GiB of each tier."""
    if row["record"] is None:
        return [row["policy"], f"not run: {row['error']}"]
    totals, memory = row["record"]["totals"], row["record"]["memory"]
    seconds = totals["seconds"] or float("nan")
    tokens = totals["generated_tokens"], totals["generated_tokens"] + totals["prompt_tokens"]
    return [
        row["policy"], *(f"{count / seconds:,.1f}" for count in tokens), f"{seconds:.1f}",
        f"{totals['load_seconds']:.1f}",
        *(f"{memory[tier]['peak'] / 2**30:.2f}" for tier in ("device", "host", "disk")),
    ]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cuda_check.py",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, cpu or pretend (default: cuda)")
    parser.add_argument("--families", help="comma-separated families of the equality checks (default: all)")
    parser.add_argument("--skip-equality", action="store_true", help="only the throughput table")
    parser.add_argument("--skip-throughput", action="store_true", help="only the equality checks")
    parser.add_argument("--shape", default="125m", help="size of the OPT, 125m to 175b (default: 125m)")
    parser.add_argument("--prompt-len", type=_count, default=128, help="tokens per prompt (default: 128)")
    parser.add_argument("--gen-len", type=_count, default=16, help="tokens to generate (default: 16)")
    parser.add_argument(
        "--device-batch", type=_count, default=8, help="sequences computed at once (default: 8)"
    )
    parser.add_argument(
        "--num-device-batches", type=_count, default=4, help="batches of a block (default: 4)"
    )
    parser.add_argument("--policies", help="comma-separated policies of the table (default: all)")
    parser.add_argument(
        "--device-memory", help="budget of the device, for instance 8GiB (default: what is free)"
    )
    parser.add_argument("--host-memory", help="budget of the host's memory")
    parser.add_argument("--disk", help="budget of the offload folder")
    parser.add_argument(
        "--offload-dir", type=_folder, help="where temporary files go (default: the system's)"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _folder(text: str) -> Path:
    folder = Path(text)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
