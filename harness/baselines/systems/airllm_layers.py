"""AirLLM: splits a checkpoint into one file per layer and loads each layer right before it computes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from harness.baselines.base import Configuration, Job, Unsupported, folder_once, size_of
from harness.baselines.sandbox.pins import TORCH, TRANSFORMERS
from harness.baselines.systems.torch_models import TorchBaseline


class AirLlmLayers(TorchBaseline):
    """`airllm.AutoModel`, which generates through transformers."""

    name = "airllm"
    title = "AirLLM"
    choices = (
        "Layers are split beforehand, as AirLLM does at first use. dtype: float32 on processors without "
        "16-bit arithmetic; a probe decides. compression: off, because AirLLM's 4 and 8 bits call CUDA "
        "whatever the device, so they need a GPU. prefetching: on, its default. Each model has a folder of "
        "its own, since AirLLM would take another model's pieces from a shared one. It runs Python's "
        "garbage collector around every layer, which takes most of its time on small models; that is left "
        "as it is."
    )
    requirements = (TORCH, *TRANSFORMERS, "airllm==4.0.0")
    packages = ("airllm", "transformers", "torch")
    defaults = {"dtype": "float32", "compression": "none", "prefetching": True}
    configurations = {
        "disk": Configuration(variants=({"dtype": "float32"}, {"dtype": "float16"})),
        "4bit": Configuration({"compression": "4bit"}, 4),
        "8bit": Configuration({"compression": "8bit"}, 8),
    }
    default_configurations = ("disk",)

    def prepare(self, job: Job) -> dict[str, Any]:
        """Split the checkpoint."""
        self._check(job)
        folder = folder_once(self._folder(job), lambda folder: self._open(job, folder))
        return {"split_bytes": size_of(folder)}

    def load(self, job: Job) -> dict[str, Any]:
        """Attach the hooks; weights are loaded while computing."""
        self._check(job)
        self._start(job)
        begin = time.perf_counter()
        self._opened = self._open(job, self._folder(job))
        self._model = self._opened.model
        return {"load_s": time.perf_counter() - begin}

    def _check(self, job: Job) -> None:
        if job.settings["compression"] != "none" and job.device == "cpu":
            raise Unsupported("AirLLM's compression needs a GPU: it moves weights to CUDA to unpack them")

    def _folder(self, job: Job) -> Path:
        return Path(job.work) / f"airllm-{job.settings['compression']}"

    def _open(self, job: Job, folder: Path) -> Any:
        import torch
        from airllm import AutoModel

        compression = str(job.settings["compression"])
        return AutoModel.from_pretrained(
            job.model,
            device="cuda:0" if job.device == "cuda" else "cpu",
            dtype=getattr(torch, str(job.settings["dtype"])),
            layer_shards_saving_path=str(folder),
            compression=None if compression == "none" else compression,
            prefetching=bool(job.settings["prefetching"]),
            max_seq_len=job.prompt_len + job.new_tokens,
        )
