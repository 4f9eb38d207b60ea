#!/usr/bin/env python
"""Runs the committed comparisons of the engine with other offloaders, in results/comparisons.

    python benchmarks/comparison.py                          # all shapes: hours on two cores
    python benchmarks/comparison.py --shapes llama-134m      # one
    python benchmarks/comparison.py --quick                  # few tokens and systems: shows that it runs

Models are synthetic checkpoints of published shapes, each compared without a memory limit and with less RAM
than the model needs. It is ``run_helm.py compare`` with these settings; it continues where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.script import run
from benchmarks.synthetic import checkpoint
from harness.baselines import registry
from harness.commands.compare import read_batches
from harness.comparison.options import CompareOptions
from harness.comparison.runner import run_comparison

SHAPES = {
    "llama-134m": ("none", "400%"),
    "llama-1.1b": ("none", "50%"),
    "1.3b": ("none", "50%"),
}
"""Memory limits by shape. Python, torch and transformers alone take more than half of the smallest one."""

SYSTEMS = (
    "ours", "ours/4bit-a8", "ours/8bit", "accelerate", "transformers", "llama-cpp", "llama-cpp/q8_0",
    "deepspeed", "airllm", "openvino", "petals", "flexgen", "vllm", "ollm",
)  # fmt: skip
LLAMA_ONLY = ("llama-cpp", "llama-cpp/q8_0", "airllm")
TOKENIZER = Path(__file__).resolve().parent.parent / "scenarios" / "demo" / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare shape by shape; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--caps", nargs="+", metavar="CAP", help="instead of the shape's")
    parser.add_argument("--prompt-len", type=int, default=512, metavar="N")
    parser.add_argument("--gen-len", type=int, default=32, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--batch", nargs="+", default=[], metavar="[NAME=]N", help="fixed; else searched")
    parser.add_argument("--first-batch", nargs="+", default=[], metavar="[NAME=]N", help="as of compare")
    parser.add_argument("--set", nargs="+", default=[], metavar="SYSTEM.KEY=VALUE", help="as of compare")
    parser.add_argument("--most-batch", type=int, default=32, metavar="N")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of one run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--quick", action="store_true", help="few tokens and systems, in a folder of its own")
    parser.add_argument("--name", metavar="NAME", help="of the comparison; default: cpu-SHAPE")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path("results/offload/comparisons"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.systems, options.repeats = ["llama-134m"], ["ours/full", "accelerate"], 2
        options.prompt_len, options.gen_len, options.most_batch = 32, 4, 2
        options.out = options.work / "quick"
    for shape in options.shapes:
        model = checkpoint(options.work / "models", shape)
        for file in TOKENIZER.glob("tokenizer*"):  # some systems require one; only ids are exchanged
            shutil.copy(file, model)
        is_llama = shape.startswith("llama")
        named = [name for name in options.systems if is_llama or name not in LLAMA_ONLY]
        result = run_comparison(
            CompareOptions(
                model=model,
                name=options.name or f"cpu-{model.name}",
                systems=named,
                memory_caps=options.caps or SHAPES[shape],
                prompt_len=options.prompt_len,
                gen_len=options.gen_len,
                repeats=options.repeats,
                batches=read_batches(options.batch),
                first_batches=read_batches(options.first_batch, "--first-batch"),
                most_batch=options.most_batch,
                timeout_s=options.timeout,
                threads=options.threads,
                overrides=registry.overrides(options.set),
                output_path=options.out,
                work=options.work / "derived",
            )
        )
        print(result.shown)
        print(f"comparison: {result.folder}\n")
    return 0


if __name__ == "__main__":
    run(main)
