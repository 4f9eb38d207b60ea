"""DeepSpeed's ZeRO-Inference: stage 3 with parameters in RAM or on NVMe, fetched layer by layer."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.baselines.base import Configuration, Job, Unsupported
from harness.baselines.sandbox.pins import TORCH, TRANSFORMERS
from harness.baselines.systems.torch_models import TorchBaseline, checkpoint_of

_OPERATIONS = "tierbench-extensions"
_DTYPES = ({"dtype": "float32"}, {"dtype": "bfloat16"})


class DeepSpeedZero(TorchBaseline):
    """`deepspeed.initialize` with ``offload_param``, generating by transformers."""

    name = "deepspeed"
    title = "DeepSpeed ZeRO-Inference"
    choices = (
        "ZeRO stage 3 with offload_param to cpu or nvme, as in its ZeRO-Inference tutorial. dtype: "
        "float32 and bfloat16 are probed; DeepSpeed refuses float16 on CPUs, so a GPU gets float16 by "
        "--set deepspeed.dtype=float16. The checkpoint is cast to that dtype beforehand, because quantised "
        "initialisation silently garbles weights of another dtype. buffers: 5, its default; each is as large "
        "as the largest parameter. persistence threshold 0, so that small parameters are offloaded like the "
        "large ones. Its operators are compiled when it is installed, never under a limit. The KV cache "
        "stays in memory: offloading it needs a fork of transformers that no package index has."
    )
    requirements = (TORCH, *TRANSFORMERS, "wheel", "ninja", "setuptools<82")
    later_requirements = ("deepspeed==0.19.8",)
    needs = "a C++ compiler and the headers of libaio (on Debian libaio-dev); builds for several minutes"
    packages = ("deepspeed", "transformers", "torch")
    defaults = {
        "dtype": "float32", "offload": "nvme", "bits": 16, "buffers": 5, "aio_block": 1 << 20,
        "aio_depth": 16, "aio_threads": 1,
    }  # fmt: skip
    configurations = {
        "cpu": Configuration({"offload": "cpu"}, variants=_DTYPES),
        "nvme": Configuration({"offload": "nvme"}, variants=_DTYPES),
        "nvme-8bit": Configuration({"offload": "nvme", "bits": 8}, 8),
        "nvme-4bit": Configuration({"offload": "nvme", "bits": 4}, 4),
        "cpu-4bit": Configuration({"offload": "cpu", "bits": 4}, 4),
    }
    default_configurations = ("cpu", "nvme")

    def environment(self, folder: Path | None) -> dict[str, str]:
        """A cluster of one process, and the operators that were compiled by the installation."""
        chosen = {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + os.getpid() % 20000),
        }  # fmt: skip
        if folder is not None:
            chosen["TORCH_EXTENSIONS_DIR"] = str(folder / _OPERATIONS)
        return chosen

    def after_install(self, python: Path) -> Sequence[Sequence[str]]:
        """Compile the operators."""
        code = (
            "import torch, deepspeed; from deepspeed.ops.op_builder import AsyncIOBuilder; "
            "AsyncIOBuilder().load(); deepspeed.init_distributed('gloo' if not torch.cuda.is_available() "
            "else 'nccl')"
        )
        return [[str(python), "-c", code]]

    def prepare(self, job: Job) -> dict[str, Any]:
        """Cast the checkpoint to the dtype of the computation."""
        return {"checkpoint": checkpoint_of(job, self._dtype(job)).name}

    def load(self, job: Job) -> dict[str, Any]:
        """Partition the model while it is loaded."""
        import deepspeed
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations import HfDeepSpeedConfig

        self._start(job)
        dtype = self._dtype(job)
        checkpoint = checkpoint_of(job, dtype)
        begin = time.perf_counter()
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed("nccl" if job.device == "cuda" else "gloo")
        config = self._config(job, dtype, AutoConfig.from_pretrained(checkpoint))
        self._kept = HfDeepSpeedConfig(config)  # transformers looks for it while it loads
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self._engine = deepspeed.initialize(model=model.eval(), config=config)[0]
        self._model = self._engine.module.eval()
        return {"load_s": time.perf_counter() - begin, "config": config}

    def _dtype(self, job: Job) -> str:
        dtype = str(job.settings["dtype"])
        if dtype == "float16" and job.device == "cpu":
            raise Unsupported("DeepSpeed refuses float16 on CPUs: use float32 or bfloat16")
        return dtype

    def _config(self, job: Job, dtype: str, model: Any) -> dict[str, Any]:
        settings = job.settings
        hidden, vocabulary = model.hidden_size, model.vocab_size
        inner = getattr(model, "intermediate_size", None) or getattr(model, "ffn_dim", 4 * hidden)
        offload: dict[str, Any] = {"device": str(settings["offload"]), "pin_memory": job.device == "cuda"}
        if settings["offload"] == "nvme":
            swap = Path(job.scratch) / "nvme"
            swap.mkdir()
            largest = max(vocabulary, inner) * hidden
            offload |= {
                "nvme_path": str(swap),
                "buffer_count": int(settings["buffers"]),
                "buffer_size": -(-largest // 1024) * 1024,  # of elements, not of bytes
            }
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": sys.maxsize,
            "bf16": {"enabled": dtype == "bfloat16"},
            "fp16": {"enabled": dtype == "float16"},
            "zero_optimization": {
                "stage": 3,
                "offload_param": offload,
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 2 * hidden * hidden,
                "stage3_max_live_parameters": 2 * hidden * inner * 4,
            },
            "aio": {
                "block_size": int(settings["aio_block"]),
                "queue_depth": int(settings["aio_depth"]),
                "thread_count": int(settings["aio_threads"]),
                "single_submit": False,
                "overlap_events": True,
            },
        }
        if int(settings["bits"]) < 16:
            config["weight_quantization"] = {
                "quantized_initialization": {
                    "num_bits": int(settings["bits"]), "group_size": 64, "group_dim": 1, "symmetric": False,
                }
            }  # fmt: skip
        return config
