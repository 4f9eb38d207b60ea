"""Hugging Face Accelerate: weights that do not fit stay in RAM or on disk and are loaded layer by layer.

It runs in our own environment, which has the newest release of Accelerate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.baselines.base import Configuration, Job, Settings
from harness.baselines.systems.torch_models import TorchBaseline, layered_map

_DISK = (
    {"dtype": "float32", "map": "layers"},
    {"dtype": "bfloat16", "map": "layers"},
    {"dtype": "float16", "map": "layers"},
    {"dtype": "bfloat16", "map": "all"},
    {"dtype": "float16", "map": "all"},
)


class AccelerateOffload(TorchBaseline):
    """``device_map`` with an offload folder, as transformers' documentation of big models recommends."""

    name = "accelerate"
    title = "Hugging Face Accelerate, offloading to disk or RAM"
    choices = (
        "Offloading by device_map in from_pretrained and not by accelerate.disk_offload: the latter loads "
        "the whole model into memory first and writes it out again, which a limit forbids; device_map reads "
        "the safetensors in place. map: layers keeps decoder layers on disk, embeddings and head in memory; "
        "all keeps everything on disk; cpu keeps everything in RAM (which is offloading only with a GPU); "
        "auto:F leaves the choice to Accelerate, with F times the model's bytes for weights. dtype: float16 "
        "is the checkpoint's own and needs no cast in every pass, float32 computes faster on CPUs without "
        "16-bit arithmetic; a short probe decides. cache: dynamic; with a GPU, offloaded keeps the KV cache "
        "in RAM."
    )
    packages = ("accelerate", "transformers", "torch", "safetensors")
    defaults = {"dtype": "float16", "map": "layers", "cache": "dynamic"}
    configurations = {
        "disk": Configuration(variants=_DISK),
        "cpu": Configuration({"map": "cpu"}, variants=({"dtype": "float32"}, {"dtype": "bfloat16"})),
    }
    default_configurations = ("disk",)

    def variants(self, configuration: str, capped: bool) -> Sequence[Settings]:
        """The variants; without a limit there is no reason to keep the embeddings on disk."""
        known = self.configurations[configuration].variants
        return known if capped else [variant for variant in known if variant.get("map") != "all"]

    def load(self, job: Job) -> dict[str, Any]:
        """Load what the map keeps in memory; the rest stays on disk."""
        import torch
        from transformers import AutoModelForCausalLM

        self._start(job)
        offload = Path(job.scratch) / "accelerate-offload"
        offload.mkdir()
        begin = time.perf_counter()
        arguments: dict[str, Any] = {
            "offload_folder": str(offload), "dtype": getattr(torch, str(job.settings["dtype"])),
        }  # fmt: skip
        where, fast = str(job.settings["map"]), "cpu" if job.device == "cpu" else 0
        if where.startswith("auto:"):
            total = sum(path.stat().st_size for path in Path(job.model).glob("*.safetensors"))
            arguments |= {"device_map": "auto", "max_memory": {fast: int(float(where[5:]) * total)}}
        elif where == "cpu" and job.device == "cpu":
            arguments["device_map"] = "cpu"
        else:
            base, layers = "disk" if where == "all" else fast, "cpu" if where == "cpu" else "disk"
            arguments["device_map"] = layered_map(job.model, base, layers)
        self._model = AutoModelForCausalLM.from_pretrained(job.model, **arguments).eval()
        return {"load_s": time.perf_counter() - begin}
