"""Our own engine behind the same interface and the same clock as the systems that it is compared with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.baselines.base import (
    Baseline,
    Configuration,
    Generated,
    Ids,
    Job,
    Refused,
    Settings,
    anonymous_bytes,
)

MARGIN = 128 << 20
"""Bytes of the limit that are kept from the engine, for the interpreter, libraries and small allocations."""

_RESIDENT = ({"policy": "weights=device,kv=device"},)
_STREAMED = ({"policy": "weights=disk,kv=host"}, {"policy": "weights=disk,kv=disk"})


class Ours(Baseline):
    """`engine.engine.Engine` with a policy."""

    name = "ours"
    title = "Tierbench"
    choices = (
        "policy: all in memory without a limit; under one, that or weights on disk with the KV cache in "
        "memory or on disk; a probe decides. budget: the limit minus what the process holds and a margin of "
        "128 MiB; without a limit, all free memory. fill: as many tenths of the weights on disk as the "
        "budget still allows stay in memory. device_batch 0: as many of the batch's sequences as the budget "
        "allows are computed at once (all, half of them, a quarter and so on); all share each pass over the "
        "weights. If memory cannot hold the KV cache even then, it goes to the disk. max_batch_tokens 0: "
        "one prompt and one token of every other sequence, so that the prompts of a device batch are "
        "computed one after the other and their hidden states fit. kv_quant: float16, as in other systems; "
        "full-kv32 keeps the float32 of the computation. 4 bits: best4 weights; 4bit-a8: w4a8, whose "
        "products round activations to 8 bits and multiply integers, as llama.cpp's do. matmul_precision: "
        "medium, which means bfloat16, as in other systems, on a CPU that is faster at it (AMX, AVX512-BF16 "
        "of AMD), and float32 on any other CPU."
    )
    packages = ("tierbench", "torch", "transformers")
    defaults = {
        "policy": "weights=device,kv=device",
        "weight_quant": "16",
        "kv_quant": "float16",
        "matmul_precision": "medium",
        "device_batch": 0,
        "fill": 1,
        "max_batch_tokens": 0,
        "margin": MARGIN,
        "device_memory": 0,
    }
    configurations = {
        "full": Configuration(bits=16),
        "8bit": Configuration({"weight_quant": "8"}, bits=8),
        "4bit": Configuration({"weight_quant": "best4"}, bits=4),
        "4bit-a8": Configuration({"weight_quant": "w4a8"}, bits=4),
        "full-kv32": Configuration({"kv_quant": "16"}, bits=16),
        "4bit-kv4": Configuration({"weight_quant": "best4", "kv_quant": "4"}, bits=4),
    }
    default_configurations = ("full", "4bit")

    def variants(self, configuration: str, capped: bool) -> Sequence[Settings]:
        """The policies that may fit."""
        return _STREAMED + _RESIDENT if capped else _RESIDENT

    def load(self, job: Job) -> dict[str, Any]:
        """Read headers; weights are loaded with the first request, which is the warm-up."""
        settings = job.settings
        host = None
        if job.cap_bytes is not None:
            with self._made(job, 1, None) as engine:
                self._fits(engine, job)  # imports the model's code, which is not part of the budget
            host = job.cap_bytes - anonymous_bytes() - int(settings["margin"])
            if host <= 0:
                raise Refused(f"the limit of {job.cap_bytes} bytes leaves nothing beside Python and torch")
        size = int(settings["device_batch"])
        begin = time.perf_counter()
        self._engine = self._made(job, size, host) if size else self._largest(job, host)
        if int(settings["fill"]) and self._engine.policy.weights.disk == 1:
            self._fill(job)
        policy = self._engine.policy.to_dict()
        return {"load_s": time.perf_counter() - begin, "policy": policy, "host_budget": host}

    def _largest(self, job: Job, host: int | None) -> Any:
        """An engine that computes as many sequences at once as fit; its block is the whole batch.

        A KV cache that does not fit into memory even with one sequence at a time goes to the disk.
        """
        from engine.spec.hardware import Tier
        from engine.spec.policy import Placement

        engine = self._made(job, job.batch, host)
        sizes = [job.batch]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        asked = self._policy(job, 1).kv
        on_disk = [Placement.all_in(Tier.DISK)] if asked.host else []
        for kv, size in itertools.product((asked, *on_disk), sizes):
            engine.policy = self._policy(job, size).replace(kv=kv)
            if self._fits(engine, job):
                break  # if nothing fits, the last policy's error says what is missing
        return engine

    def _fill(self, job: Job) -> None:
        """Keep as many tenths of the weights in memory as fit beside everything else."""
        from engine.spec.policy import Placement

        streamed = self._engine.policy
        for tenths in range(9, 0, -1):
            part = tenths / 10
            self._engine.policy = streamed.replace(weights=Placement(0, part, 1 - part))
            if self._fits(self._engine, job):
                return
        self._engine.policy = streamed

    @staticmethod
    def _fits(engine: Any, job: Job) -> bool:
        """Whether the engine's policy fits its budget for the job's requests."""
        from engine.errors import BudgetError
        from engine.spec.request import Request

        rest = (4,) * (job.prompt_len - 1)  # no two prompts begin alike, so no shared prefix is planned
        try:
            engine.check([Request((index, *rest), job.new_tokens) for index in range(job.batch)])
        except BudgetError:
            return False
        return True

    def _made(self, job: Job, size: int, host: int | None) -> Any:
        """An engine that computes ``size`` sequences at once, with ``host`` bytes of host memory."""
        from engine.engine import Engine
        from engine.spec.hardware import Budgets

        return Engine(
            job.model,
            self._policy(job, size),
            budgets=Budgets(device=int(job.settings["device_memory"]) or None, host=host),
            offload_dir=Path(job.scratch) / "ours-offload",
            device=job.device,
            store=Path(job.work) / "ours-store",
        )

    def _policy(self, job: Job, size: int) -> Any:
        """The job's policy: the whole batch as one block, ``size`` sequences at once."""
        from engine.spec.policy import Policy

        settings = job.settings
        tokens = int(settings["max_batch_tokens"]) or job.prompt_len + size
        keys = ("weight_quant", "kv_quant", "matmul_precision")
        text = ",".join([str(settings["policy"]), *(f"{key}={settings[key]}" for key in keys)])
        return Policy.parse(text).replace(
            device_batch=size, num_device_batches=-(-job.batch // size), max_batch_tokens=tokens
        )

    def prepare(self, job: Job) -> dict[str, Any]:
        """Pack the weights into the store, unless they are packed already."""
        if str(job.settings["weight_quant"]) == "16":
            return {}
        self.load(Job(**{**vars(job), "cap_bytes": None, "batch": 1, "prompt_len": 1, "new_tokens": 1}))
        self._engine.generate([[4]], 1)
        self._engine.close()
        return {"store": "packed"}

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Greedy, in one call; prefill ends with the pass that computes the last prompt token."""
        from engine.errors import BudgetError
        from engine.spec.request import CallProgress, Request

        asked = sum(map(len, prompts))
        first: list[float] = []

        def watch(progress: CallProgress) -> None:
            if not first and progress.pass_done >= 1 and progress.prompt_tokens >= asked:
                first.append(time.perf_counter())

        requests = [Request(tuple(ids), new_tokens) for ids in prompts]
        begin = time.perf_counter()
        try:
            outputs = self._engine.answer(requests, on_progress=watch)
        except BudgetError as error:
            raise Refused(str(error)) from error
        end = time.perf_counter()
        middle = first[0] if first else end
        return Generated([list(output.tokens) for output in outputs], middle - begin, end - middle)

    def score(self, sequences: Ids) -> list[list[float]]:
        """By the engine's own scoring."""
        return [list(found) for found in self._engine.score(sequences)]

    def device_peak(self) -> int:
        """Peak bytes from the engine's record."""
        process = self._engine.record().process
        return process.device_peak or 0 if process else 0

    def versions(self) -> dict[str, str]:
        """As for any system, except that the engine may run from a checkout that is not installed."""
        return {"tierbench": "checkout", **super().versions()}
