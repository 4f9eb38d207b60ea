"""A small throughput table: an OPT of a known size with random weights, a few policies, one workload.

Random weights are as fast as trained ones; their answers mean nothing. Every figure is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import OPTConfig

from engine.engine import Engine
from engine.errors import TierbenchError
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord
from engine.spec.request import Progress, Request

SHAPES: dict[str, tuple[int, int, int]] = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}
"""Layers, hidden width and heads of the OPT models (Zhang et al. 2022, table 1)."""

POLICIES: dict[str, str] = {
    "resident": "weights=device",
    "weights on host": "weights=host",
    "weights and KV on host": "weights=host,kv=host",
    "half of all on host": "weights=0.5/0.5/0,kv=0.5/0.5/0",
    "4 bits on host": "weights=host,kv=host,weight_quant=4,kv_quant=4",
    "weights on disk": "weights=disk,kv=host",
    "4 bits on disk": "weights=disk,kv=host,weight_quant=4,kv_quant=4",
}


@dataclass(frozen=True)
class Workload:
    """What is run."""

    shape: str
    prompt_len: int
    gen_len: int
    device_batch: int
    num_device_batches: int


@dataclass(frozen=True)
class Row:
    """What one policy did."""

    policy: str
    error: str | None
    record: EngineRecord | None
    """`Engine.record`."""

    def cells(self) -> list[str]:
        """The row as printed: policy, generated and total token/s, seconds, peak bytes per tier."""
        if self.record is None:
            return [self.policy, f"not run: {self.error}"]
        totals, memory = self.record.totals, self.record.memory
        seconds = totals.seconds or float("nan")
        tokens = totals.generated_tokens, totals.generated_tokens + totals.prompt_tokens
        return [
            self.policy,
            *(f"{count / seconds:,.1f}" for count in tokens),
            f"{seconds:.1f}",
            f"{totals.load_seconds:.1f}",
            *(f"{memory[tier].peak / 2**30:.2f}" for tier in ("device", "host", "disk")),
        ]


HEADER = ["policy", "gen token/s", "all token/s", "seconds", "load s", "device GiB", "host GiB", "disk GiB"]


def rows(
    workload: Workload,
    policies: Sequence[str],
    device: str,
    budgets: Budgets,
    offload_dir: Path | None = None,
    on_progress: Callable[[str, Progress], None] | None = None,
) -> Iterator[Row]:
    """Run the workload once per policy; a policy that does not fit is a row that says so."""
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=offload_dir) as scratch:
        folder = Path(scratch) / "model"
        config_of(workload).save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        count = workload.device_batch * workload.num_device_batches
        prompts = torch.randint(3, 50_000, (count, workload.prompt_len), generator=generator).tolist()
        requests = [Request(tuple(prompt), workload.gen_len) for prompt in prompts]
        for name in policies:
            block = f"device_batch={workload.device_batch},num_device_batches={workload.num_device_batches}"
            policy = Policy.parse(f"{POLICIES[name]},{block}").replace(name=name)
            report = (lambda progress, name=name: on_progress(name, progress)) if on_progress else None
            try:
                with Engine(
                    folder,
                    policy,
                    budgets=budgets,
                    device=device,
                    weights="random",
                    offload_dir=Path(scratch) / "offload",
                ) as engine:
                    engine.answer(requests, on_progress=report)
                    yield Row(name, None, engine.record())
            except TierbenchError as error:
                yield Row(name, str(error), None)


def config_of(workload: Workload) -> OPTConfig:
    """The config of a workload's model."""
    layers, hidden, heads = SHAPES[workload.shape]
    return OPTConfig(
        num_hidden_layers=layers, hidden_size=hidden, ffn_dim=4 * hidden, num_attention_heads=heads,
        word_embed_proj_dim=hidden, vocab_size=50_272, dtype="float16", architectures=["OPTForCausalLM"],
        max_position_embeddings=max(2048, workload.prompt_len + workload.gen_len),
    )  # fmt: skip
