"""Never run so far: FlexGen's own package, the engine of the paper, for OPT on a CUDA device."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from harness.baselines.base import (
    Baseline,
    Configuration,
    Generated,
    Ids,
    Job,
    Unsupported,
    folder_once,
    size_of,
)
from harness.baselines.sandbox.pins import TORCH


class FlexGenOpt(Baseline):
    """`flexgen.flex_opt.OptLM`."""

    name = "flexgen"
    title = "FlexGen (the paper's package)"
    choices = (
        "percent: the six placement numbers of its command line (weights, KV cache and hidden states on the "
        "device and in RAM; the rest is on disk); by default all weights are on disk and all else in RAM. "
        "overlap and separate layers: on, its defaults. pin: off, which its README recommends to save RAM. "
        "compress_weight: its group-wise 4 bits. cpu_cache_compute: attention on the processor, as it "
        "advises where the cache is in RAM."
    )
    requirements = (TORCH, "transformers==4.57.6", "numpy<2", "safetensors==0.8.0", "flexgen==0.1.8")
    needs = "an NVIDIA GPU when it runs"
    packages = ("flexgen", "transformers", "torch")
    devices = ("cuda",)
    defaults = {
        "percent": "0 0 0 100 0 100", "num_gpu_batches": 1, "compress_weight": False, "compress_cache": False,
        "cpu_cache_compute": True, "overlap": True, "pin_weight": False,
    }  # fmt: skip
    configurations = {
        "disk": Configuration(),
        "cpu": Configuration({"percent": "0 100 0 100 0 100"}),
        "disk-4bit": Configuration({"compress_weight": True}, 4),
    }
    default_configurations = ("disk", "disk-4bit")

    def prepare(self, job: Job) -> dict[str, Any]:
        """Write the weights as FlexGen reads them: one numpy file per tensor."""
        config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
        if config.get("architectures") != ["OPTForCausalLM"]:
            raise Unsupported(f"FlexGen supports OPT only, not {config.get('architectures')}")
        if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
            raise Unsupported("FlexGen does not support OPT with projected embeddings")

        def make(folder: Path) -> None:
            import numpy as np
            from safetensors import safe_open

            for file in sorted(Path(job.model).glob("*.safetensors")):
                with safe_open(file, "np") as tensors:
                    for name in list(tensors.keys()):
                        short = name.removeprefix("model.").replace(
                            "decoder.final_layer_norm", "decoder.layer_norm"
                        )
                        with (folder / short).open("wb") as out:
                            np.save(out, tensors.get_tensor(name).astype(np.float16))
            if not (folder / "lm_head.weight").exists():
                shutil.copy(folder / "decoder.embed_tokens.weight", folder / "lm_head.weight")

        return {"bytes": size_of(folder_once(Path(job.work) / "flexgen-np", make))}

    def load(self, job: Job) -> dict[str, Any]:
        """Place weights by percent."""
        from flexgen.compression import CompressionConfig
        from flexgen.flex_opt import OptLM, Policy
        from flexgen.opt_config import OptConfig
        from flexgen.utils import ExecutionEnv

        begin = time.perf_counter()
        settings, work = job.settings, Path(job.work)
        config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
        shape = OptConfig(
            name="flexgen", num_hidden_layers=config["num_hidden_layers"],
            max_seq_len=config["max_position_embeddings"], hidden_size=config["hidden_size"],
            n_head=config["num_attention_heads"], input_dim=config["hidden_size"],
            ffn_embed_dim=config["ffn_dim"], vocab_size=config["vocab_size"],
        )  # fmt: skip
        offload = Path(job.scratch) / "flexgen-offload"
        offload.mkdir()
        batches = int(settings["num_gpu_batches"])
        if job.batch % batches:
            raise Unsupported(f"a batch of {job.batch} is not a multiple of num_gpu_batches={batches}")
        percent = [float(part) for part in str(settings["percent"]).split()]
        compressed = [
            CompressionConfig(num_bits=4, group_size=64, group_dim=dimension, symmetric=False)
            for dimension in (0, 2)
        ]
        policy = Policy(
            job.batch // batches, batches, *percent, bool(settings["overlap"]), True,
            bool(settings["pin_weight"]), bool(settings["cpu_cache_compute"]), 1.0,
            bool(settings["compress_weight"]), compressed[0], bool(settings["compress_cache"]), compressed[1],
        )  # fmt: skip
        self._env = ExecutionEnv.create(str(offload))
        self._policy = policy
        self._model = OptLM(shape, self._env, str(work), policy)
        return {"load_s": time.perf_counter() - begin}

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Greedy; FlexGen's own timer separates prefill from decode."""
        from flexgen.timer import timers

        timers("generate").reset()
        length = len(prompts[0])
        out = self._model.generate([list(ids) for ids in prompts], max_new_tokens=new_tokens)
        steps = timers("generate").costs
        return Generated(out[:, length:].tolist(), float(steps[0]), float(sum(steps[1:])))

    def device_peak(self) -> int:
        """Peak bytes by torch's count."""
        import torch

        return int(torch.cuda.max_memory_allocated())
