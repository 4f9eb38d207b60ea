"""Never run so far: vLLM, a serving engine, on a CUDA device with part of the weights in RAM."""

from __future__ import annotations

import time
from typing import Any

from harness.baselines.base import Baseline, Configuration, Generated, Ids, Job, StepClock


class VllmOffload(Baseline):
    """`vllm.LLM` with ``cpu_offload_gb``, stepped by hand so that prefill and decode can be timed apart."""

    name = "vllm"
    title = "vLLM with CPU offload"
    choices = (
        "cpu_offload_gb: how much of the weights stays in RAM and is read over the bus in every pass; 0 "
        "puts all weights on the device. Prefix caching is off, because prompts of a comparison share "
        "nothing and it would reuse the warm-up's. dtype: float16, the checkpoint's own. vLLM cannot "
        "offload to disk, and its CPU backend is a serving engine for machines whose memory holds the "
        "model, so only CUDA is offered."
    )
    requirements = ("vllm==0.33.0",)
    needs = "several gigabytes of CUDA packages, and an NVIDIA GPU when it runs"
    packages = ("vllm", "torch", "transformers")
    devices = ("cuda",)
    defaults = {
        "dtype": "float16", "cpu_offload_gb": 0.0, "gpu_memory_utilization": 0.9, "enforce_eager": False,
        "quantization": "none",
    }  # fmt: skip
    configurations = {
        "full": Configuration(),
        "offload": Configuration({"cpu_offload_gb": 8.0}),
        "fp8": Configuration({"quantization": "fp8"}, 8),
    }
    default_configurations = ("full", "offload")

    def load(self, job: Job) -> dict[str, Any]:
        """Load and compile."""
        from vllm import LLM

        begin = time.perf_counter()
        settings = job.settings
        quantised = str(settings["quantization"])
        self._llm = LLM(
            model=job.model, dtype=str(settings["dtype"]), skip_tokenizer_init=True,
            cpu_offload_gb=float(settings["cpu_offload_gb"]),
            gpu_memory_utilization=float(settings["gpu_memory_utilization"]),
            enforce_eager=bool(settings["enforce_eager"]), max_model_len=job.prompt_len + job.new_tokens + 1,
            max_num_seqs=job.batch, enable_prefix_caching=False,
            quantization=None if quantised == "none" else quantised,
        )  # fmt: skip
        return {"load_s": time.perf_counter() - begin}

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Greedy; prefill ends when every sequence has a token."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        params = SamplingParams(
            max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        found: dict[str, list[int]] = {}
        clock = StepClock()
        for index, ids in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            if not clock.steps and len(found) == len(prompts) and all(found.values()):
                clock()
        return clock.generated([found[str(index)] for index in range(len(prompts))])

    def score(self, sequences: Ids) -> list[list[float]]:
        """From the prompt log-probabilities of requests for one token."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        asked = [{"prompt_token_ids": list(ids)} for ids in sequences]
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        found = []
        for ids, output in zip(sequences, outputs, strict=True):
            pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            found.append([float(places[token].logprob) for token, places in pairs])
        return found

    def device_peak(self) -> int:
        """What the device reports as used: vLLM reserves its whole share at once."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)
