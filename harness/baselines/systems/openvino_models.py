"""OpenVINO through optimum-intel, all in memory: not an offloader, but an upper bound for processors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.baselines.base import Configuration, Job, Settings, folder_once, size_of
from harness.baselines.sandbox.pins import TORCH
from harness.baselines.systems.torch_models import TorchBaseline

_COMPRESSION: Mapping[str, Settings] = {
    "fp16": {},
    "int8": {"bits": 8, "sym": True},
    "int4": {"bits": 4, "sym": True, "group_size": 64, "ratio": 1.0},
}


class OpenVinoModels(TorchBaseline):
    """`OVModelForCausalLM`: transformers' generation loop around OpenVINO's graph."""

    name = "openvino"
    title = "OpenVINO (optimum-intel), not an offloader"
    choices = (
        "Exported beforehand from the same checkpoint; int8 and int4 by its own weight compression (int4 "
        "symmetric, groups of 64, all layers). It computes in float32, as processors without 16-bit "
        "arithmetic do anyway: they ignore a hint of bfloat16. The KV cache is float32 unless kv=u8 is set, "
        "OpenVINO's own default. Threads are set by inference_num_threads."
    )
    requirements = (TORCH, "optimum-intel[openvino]==2.2.0", "openvino==2026.4.1")
    unwanted = ("torchvision",)
    packages = ("openvino", "optimum-intel", "nncf", "transformers", "torch")
    devices = ("cpu",)
    defaults = {"weights": "fp16", "kv": "f32"}
    configurations = {
        "fp16": Configuration({"weights": "fp16"}),
        "int8": Configuration({"weights": "int8"}, 8),
        "int4": Configuration({"weights": "int4"}, 4),
    }
    default_configurations = ("fp16", "int4")

    def prepare(self, job: Job) -> dict[str, Any]:
        """Export and compress."""
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        how = _COMPRESSION[str(job.settings["weights"])]

        def make(folder: Path) -> None:
            quantised = OVWeightQuantizationConfig(**how) if how else None
            chosen = {"quantization_config": quantised} if how else {"load_in_8bit": False}
            model = OVModelForCausalLM.from_pretrained(job.model, export=True, compile=False, **chosen)
            if not how:
                model.half()
            model.save_pretrained(folder)

        return {"bytes": size_of(folder_once(self._folder(job), make))}

    def load(self, job: Job) -> dict[str, Any]:
        """Compile the exported model for this processor."""
        from optimum.intel import OVModelForCausalLM

        self._start(job)
        begin = time.perf_counter()
        settings = {
            "INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": str(job.settings["kv"]), "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        self._model = OVModelForCausalLM.from_pretrained(self._folder(job), ov_config=settings, compile=True)
        return {"load_s": time.perf_counter() - begin}

    def _logits(self, ids: Any) -> Any:
        """Logits [1, n, V] of ids [1, n]; OpenVINO's graph needs a mask."""
        import torch

        return self._model(ids, attention_mask=torch.ones_like(ids)).logits

    def _folder(self, job: Job) -> Path:
        return Path(job.work) / f"openvino-{job.settings['weights']}"
