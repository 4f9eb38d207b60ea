"""One run of one offloader, started by offloaders.py in a process under a memory limit.

The last line of its standard output is JSON: seconds of the run, its tokens, and what was configured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

MARGIN = 128 << 20
"""Bytes of the limit that the engine is not given beside what Python holds: libraries, small things."""


def main() -> int:
    """Run what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=("engine", "accelerate"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--offload", type=Path, required=True)
    parser.add_argument("--config", required=True)
    for name in ("--limit", "--batch", "--prompt", "--generate", "--seed"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    found = (engine if options.system == "engine" else accelerate)(options)
    print(json.dumps(found), flush=True)
    return 0


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """Our engine: all that the limit leaves, less a margin, is its budget. Page cache gives way, so it is
    not counted as held."""
    from benchmarks.passes import PassClock
    from benchmarks.synthetic import prompts
    from engine.engine import Engine
    from engine.errors import BudgetError
    from engine.spec.hardware import Budgets
    from engine.spec.policy import Policy
    from engine.spec.request import Request

    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    room = options.limit - held - MARGIN
    policy = Policy.parse(options.config).replace(
        # Prompts of one device batch wait for each other, so that their hidden states fit.
        device_batch=options.batch, num_device_batches=1, max_batch_tokens=options.prompt + options.batch
    )  # fmt: skip
    with Engine(options.model, policy, budgets=Budgets(host=room), offload_dir=options.offload) as model:
        ids = prompts(options.batch, options.prompt, model.spec.vocab_size, options.seed)
        requests = [Request(row, options.generate) for row in ids]
        try:
            model.check(requests)
        except BudgetError as error:
            return {"refused": str(error), "budget": room}
        clock = PassClock()
        outputs = model.answer(requests, on_progress=clock)
        record = model.record()
        return {
            "seconds": record["totals"]["seconds"],
            "load_seconds": record["totals"]["load_seconds"],
            "tokens": sum(len(output.tokens) for output in outputs),
            "first": [list(output.tokens[:6]) for output in outputs[:2]],
            "passes": clock.seconds,
            "budget": room,
            "memory": record["memory"],
        }


def accelerate(options: argparse.Namespace) -> dict[str, Any]:
    """Accelerate's disk offload by transformers' ``device_map``, as its documentation has it.

    The config is ``dtype,map``: map ``layers`` sends the layers to disk, ``all`` everything, ``auto:F``
    leaves to Accelerate what goes there, with F of the model's bytes for weights in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.synthetic import prompts

    dtype, where = options.config.split(",")
    config = AutoConfig.from_pretrained(options.model)
    begin = time.perf_counter()
    arguments: dict[str, Any] = {"offload_folder": str(options.offload), "dtype": getattr(torch, dtype)}
    if where.startswith("auto:"):
        total = (options.model / "model.safetensors").stat().st_size
        arguments |= {"device_map": "auto", "max_memory": {"cpu": int(float(where[5:]) * total)}}
    else:
        base = "disk" if where == "all" else "cpu"
        rest = ("embed_tokens", "embed_positions", "final_layer_norm")
        named = {**{f"model.decoder.{name}": base for name in rest}, "lm_head": base}
        layers = {f"model.decoder.layers.{index}": "disk" for index in range(config.num_hidden_layers)}
        arguments["device_map"] = {**named, **layers}
    model = AutoModelForCausalLM.from_pretrained(options.model, **arguments).eval()
    load_seconds = time.perf_counter() - begin
    ids = torch.tensor(prompts(options.batch, options.prompt, config.vocab_size, options.seed))
    with torch.inference_mode():
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.generate,
            min_new_tokens=options.generate, do_sample=False, eos_token_id=None, use_cache=True,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    new = out[:, options.prompt :]
    return {
        "seconds": seconds,
        "load_seconds": load_seconds,
        "tokens": new.numel(),
        "first": new[:2, :6].tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
