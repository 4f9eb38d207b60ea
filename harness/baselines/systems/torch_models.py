"""What the systems that run models of `transformers` share in their children: timed generation and scoring.

Torch and transformers are imported inside functions, because this file is also read where they are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.baselines.base import Baseline, Generated, Ids, Job, StepClock, folder_once


class TorchBaseline(Baseline):
    """A system that hooks into a model of `transformers`, which is called as usual.

    `load` calls `_start` and sets the model.
    """

    _model: Any
    _device: str
    _generate_with: Mapping[str, Any] = {}
    """Further arguments of `transformers`' generate, such as a cache implementation."""

    def _start(self, job: Job) -> None:
        """Set torch's threads and seed, and note the device and the KV cache's implementation."""
        import torch

        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self._device = job.device
        if (cache := str(job.settings.get("cache", "dynamic"))) != "dynamic":
            self._generate_with = {"cache_implementation": cache}

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """By `transformers`' own generate, during which the system's hooks load the weights."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        device, clock = self._device, StepClock()

        class EachStep(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                if device == "cuda":
                    torch.cuda.synchronize()
                clock()
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(prompts, device=device)
        self._model.generation_config.eos_token_id = None
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
                use_cache=True, stopping_criteria=StoppingCriteriaList([EachStep()]), **self._generate_with,
            )  # fmt: skip
        return clock.generated(out[:, ids.shape[1] :].tolist())

    def score(self, sequences: Ids) -> list[list[float]]:
        """One forward pass per sequence."""
        import torch

        found = []
        with torch.inference_mode():
            for sequence in sequences:
                ids = torch.tensor([sequence], device=self._device)
                logprobs = torch.log_softmax(self._logits(ids)[0, :-1].float(), -1)  # [n - 1, V]
                found.append(logprobs.gather(1, ids[0, 1:, None].to(logprobs.device))[:, 0].tolist())
        return found

    def device_peak(self) -> int:
        """Peak bytes by torch's count."""
        import torch

        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0

    def _logits(self, ids: Any) -> Any:
        """Logits [1, n, V] of ids [1, n]."""
        return self._model(ids, use_cache=False).logits


def layered_map(model: str, base: str | int, layers: str) -> dict[str, str | int]:
    """A device map with the decoder layers on the device ``layers`` and all the rest on ``base``.

    The layers are found in the empty model (its largest module list), so it works for every architecture.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    longest = max(
        (item for item in empty.named_modules() if isinstance(item[1], torch.nn.ModuleList)),
        key=lambda item: sum(p.numel() for p in item[1].parameters()),
    )[0]
    placed: dict[str, str | int] = {}

    def place(module: Any, name: str) -> None:
        if name == longest:
            placed.update({f"{name}.{child}": layers for child, _ in module.named_children()})
        elif longest.startswith(f"{name}.") or not name:
            for child, inner in module.named_children():
                place(inner, f"{name}.{child}" if name else child)
        else:
            placed[name] = base

    place(empty, "")
    return placed


def checkpoint_of(job: Job, dtype: str) -> Path:
    """The checkpoint in another dtype, written once, for systems that do not cast while loading.

    It is converted file by file, so that the whole model is never in memory.
    """
    import json
    import shutil

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    source = Path(job.model)

    def make(folder: Path) -> None:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for path in source.iterdir():
            if path.name.startswith(("tokenizer", "generation", "vocab", "merges", "special")):
                shutil.copy(path, folder)
        index: dict[str, str] = {}
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                cast = {
                    name: tensors.get_tensor(name).to(wanted).contiguous() for name in list(tensors.keys())
                }
            save_file(cast, folder / file.name, metadata={"format": "pt"})
            index |= dict.fromkeys(cast, file.name)
        if len(set(index.values())) > 1:
            text = json.dumps({"metadata": {}, "weight_map": index})
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    return folder_once(Path(job.work) / f"checkpoint-{dtype}", make)
