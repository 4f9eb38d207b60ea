"""Plain `transformers` with the whole model in memory: the control where it fits, and everyone's reference.

It runs in our own environment, because the engine uses the same release.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from harness.baselines.base import Configuration, Job, Settings
from harness.baselines.systems.torch_models import TorchBaseline


class TransformersPlain(TorchBaseline):
    """`AutoModelForCausalLM` without anything added."""

    name = "transformers"
    title = "Hugging Face transformers, all in memory"
    choices = (
        "dtype: the probe takes the fastest of float32, bfloat16 and the checkpoint's own, as processors "
        "without 16-bit arithmetic compute float32 faster and those with it do not. attention: sdpa, "
        "transformers' default and faster than eager. cache: dynamic, the default; static caches pay off "
        "only with compilation. compile: off, as a compiled generate takes minutes before its first token; "
        "--set transformers.compile=true turns it on. It is the reference of every other system, in float32 "
        "without a memory limit."
    )
    packages = ("transformers", "torch", "safetensors")
    defaults = {"dtype": "float32", "attention": "sdpa", "cache": "dynamic", "compile": False}
    configurations = {
        "full": Configuration(variants=({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float16"}))
    }

    def variants(self, configuration: str, capped: bool) -> Sequence[Settings]:
        """All dtypes under a limit; without one, float16 is left out, as CPUs are slowest at it."""
        return self.configurations[configuration].variants[: None if capped else 2]

    def load(self, job: Job) -> dict[str, Any]:
        """Load all weights into memory."""
        import torch
        from transformers import AutoModelForCausalLM

        self._start(job)
        settings, begin = job.settings, time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, str(settings["dtype"])), attn_implementation=settings["attention"]
        )
        self._model = model.to(job.device).eval()
        if settings["compile"]:
            self._model.forward = torch.compile(self._model.forward)
        return {"load_s": time.perf_counter() - begin}
