"""What the systems that run models of `transformers` share in their children: timed generation and scoring.

Torch and transformers are imported inside functions, because this file is also read where they are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.baselines.base import Baseline, Generated, Ids, Job, StepClock, folder_once


def start(job: Job) -> None:
    """Set torch's threads and seed."""
    import torch

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)


class TorchBaseline(Baseline):
    """A system that hooks into a model of `transformers`, which is called as usual.

    `load` sets the model and the device.
    """

    _model: Any
    _device: str
    _generate_with: Mapping[str, Any] = {}
    """Further arguments of `transformers`' generate, such as a cache implementation."""

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Greedy; the system's hooks load the weights."""
        return generate(self._model, prompts, new_tokens, self._device, **self._generate_with)

    def score(self, sequences: Ids) -> list[list[float]]:
        """One forward pass per sequence."""
        return score(self._logits, sequences, self._device)

    def device_peak(self) -> int:
        """Peak bytes by torch's count."""
        return device_peak()

    def _logits(self, ids: Any) -> Any:
        """Logits [1, n, V] of ids [1, n]."""
        return self._model(ids, use_cache=False).logits


def generate(model: Any, prompts: Ids, new_tokens: int, device: str, **more: Any) -> Generated:
    """`transformers`' own generate: greedy, exactly new_tokens tokens, no token ends a sequence.

    Args:
        prompts: of equal length, [batch, prompt_len].
        more: further arguments of generate, such as a cache implementation.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    clock = StepClock()

    class EachStep(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            if device == "cuda":
                torch.cuda.synchronize()
            clock()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor(prompts, device=device)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0, use_cache=True,
            stopping_criteria=StoppingCriteriaList([EachStep()]), **more,
        )  # fmt: skip
    return clock.generated(out[:, ids.shape[1] :].tolist())


def score(forward: Callable[[Any], Any], sequences: Ids, device: str) -> list[list[float]]:
    """Log-probabilities of every token except the first, one sequence at a time.

    Args:
        forward: from ids [1, n] to logits [1, n, V].
    """
    import torch

    found = []
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([sequence], device=device)
            logits = forward(ids)[0, :-1].float()  # [n - 1, V]
            logprobs = torch.log_softmax(logits, -1)
            found.append(logprobs.gather(1, ids[0, 1:, None].to(logprobs.device))[:, 0].tolist())
    return found


def layered_map(model: str, base: str, layers: str) -> dict[str, str]:
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
    placed: dict[str, str] = {}

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


def device_peak() -> int:
    """Peak bytes that torch has allocated on an accelerator."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


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
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config))
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
            (folder / "model.safetensors.index.json").write_text(text)

    return folder_once(Path(job.work) / f"checkpoint-{dtype}", make)
