"""llama.cpp through its own C interface: weights mapped from a GGUF file, all sequences in one batch."""

from __future__ import annotations

import ctypes
import os
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
    StepClock,
    folder_once,
    size_of,
)
from harness.baselines.systems import gguf_file

_KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
"""KV cache types, by ggml's numbers."""

_FILES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15}
"""File types of quantised weights, by llama.cpp's numbers."""

_LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "direct": 4}
_CONTEXT_STEP = 256
_MAX_SEQUENCES = 256
_SCORED = 128
"""Tokens whose logits are read at a time while scoring."""

_REPACK = ({"repack": True}, {"repack": False})


class LlamaCpp(Baseline):
    """The low-level bindings of llama-cpp-python, built for this processor."""

    name = "llama-cpp"
    title = "llama.cpp"
    choices = (
        "Built from source with GGML_NATIVE, so that it uses this processor's instructions. weights: f16 is "
        "the checkpoint's precision, f32 a control; q8_0 and q4_0 are made by llama.cpp's own quantiser, "
        "which keeps the output table at more bits. load_mode: mmap, its documented way to run what does not "
        "fit memory. repack: copies quantised weights into a faster layout, which costs memory that a limit "
        "counts; a probe decides. kv: f16, its default; q8_0 and q4_0 need flash attention, which is turned "
        "on then. Sequences share one batch (n_seq_max), and prompts are computed 2048 tokens at a time in "
        "steps of 512, its defaults."
    )
    requirements = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6")
    build_environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF"}
    needs = (
        "a C++ compiler; builds for about 12 minutes of processor time (CMAKE_ARGS=-DGGML_CUDA=ON for CUDA)"
    )
    packages = ("llama-cpp-python", "gguf", "numpy")
    defaults = {
        "weights": "f16", "kv": "f16", "load_mode": "mmap", "repack": True, "n_batch": 2048, "n_ubatch": 512,
        "flash_attention": "auto", "gpu_layers": -1,
    }  # fmt: skip
    configurations = {
        "f32": Configuration({"weights": "f32"}),
        "f16": Configuration({"weights": "f16"}),
        "q8_0": Configuration({"weights": "q8_0"}, 8, _REPACK),
        "q4_0": Configuration({"weights": "q4_0"}, 4, _REPACK),
        "q4_0-kv-q8_0": Configuration({"weights": "q4_0", "kv": "q8_0"}, 4, _REPACK),
        "q4_0-kv-q4_0": Configuration({"weights": "q4_0", "kv": "q4_0"}, 4, _REPACK),
        "q4_k_m": Configuration({"weights": "q4_k_m"}, 4, _REPACK),
    }
    default_configurations = ("f16", "q4_0")

    def prepare(self, job: Job) -> dict[str, Any]:
        """Write the GGUF file of these weights, once."""
        file = self._file(job)
        return {"file": file.name, "bytes": size_of(file)}

    def load(self, job: Job) -> dict[str, Any]:
        """Map the file and make a context for the whole batch."""
        import llama_cpp

        self._lib = llama_cpp
        settings = job.settings
        if job.batch > _MAX_SEQUENCES:
            raise Refused(f"{job.batch} sequences: llama.cpp takes at most {_MAX_SEQUENCES} at once")
        self._quiet()
        file = self._file(job)
        begin = time.perf_counter()
        params = llama_cpp.llama_model_default_params()
        params.load_mode = _LOAD_MODES[str(settings["load_mode"])]
        params.use_extra_bufts = bool(settings["repack"])
        params.n_gpu_layers = int(settings["gpu_layers"]) if job.device == "cuda" else 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        length = -(-(job.prompt_len + job.new_tokens) // _CONTEXT_STEP) * _CONTEXT_STEP
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_seq_max = length * job.batch, job.batch
        self._batch = max(int(settings["n_batch"]), job.batch)
        context.n_batch, context.n_ubatch = self._batch, int(settings["n_ubatch"])
        context.n_threads = context.n_threads_batch = job.threads
        context.type_k = context.type_v = _KINDS[str(settings["kv"])]
        flash = {"auto": -1, "off": 0, "on": 1}[str(settings["flash_attention"])]
        context.flash_attn_type = 1 if str(settings["kv"]).startswith("q") else flash
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise Refused(f"llama.cpp cannot create a context of {length * job.batch} tokens")
        self._tokens = llama_cpp.llama_batch_init(self._batch, 0, 1)
        return {"load_s": time.perf_counter() - begin, "file_bytes": size_of(file)}

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Prompts are computed n_batch tokens at a time, then each step computes one token per sequence."""
        self._clear()
        clock = StepClock()
        last: dict[int, int] = {}
        queue = [
            (token, place, index, place == len(ids) - 1)
            for index, ids in enumerate(prompts)
            for place, token in enumerate(ids)
        ]
        for start in range(0, len(queue), self._batch):
            part = queue[start : start + self._batch]
            self._decode(part)
            last |= {entry[2]: self._greedy(row) for row, entry in enumerate(part) if entry[3]}
        found = [[last[index]] for index in range(len(prompts))]
        clock()
        for step in range(1, new_tokens):
            entries = [(ids[-1], len(prompts[i]) + step - 1, i, True) for i, ids in enumerate(found)]
            self._decode(entries)
            for row, ids in enumerate(found):
                ids.append(self._greedy(row))
            clock()
        return clock.generated(found)

    def score(self, sequences: Ids) -> list[list[float]]:
        """From the logits of every position, one sequence after the other."""
        import numpy as np

        found = []
        for sequence in sequences:
            self._clear()
            values: list[float] = []
            entries = [(token, place, 0, True) for place, token in enumerate(sequence)]
            for start in range(0, len(entries), _SCORED):
                self._decode(entries[start : start + _SCORED])
                for row, target in enumerate(sequence[start + 1 : start + 1 + _SCORED]):
                    logits = self._logits(row).astype(np.float64)
                    top = logits.max()
                    total = top + np.log(np.exp(logits - top).sum())
                    values.append(float(logits[target] - total))
            found.append(values)
        return found

    def _file(self, job: Job) -> Path:
        weights = str(job.settings["weights"])
        plain = "f32" if weights == "f32" else "f16"

        def make(folder: Path) -> None:
            gguf_file.write(Path(job.model), folder / "model.gguf", plain)

        source = folder_once(Path(job.work) / f"gguf-{plain}", make) / "model.gguf"
        if weights == plain:
            return source

        def quantise(folder: Path) -> None:
            import llama_cpp

            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.nthread = _FILES[weights], job.threads
            target = str(folder / "model.gguf").encode()
            if llama_cpp.llama_model_quantize(str(source).encode(), target, ctypes.byref(params)):
                raise RuntimeError(f"llama.cpp cannot quantise to {weights}")

        return folder_once(Path(job.work) / f"gguf-{weights}", quantise) / "model.gguf"

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether logits are wanted)."""
        batch = self._tokens
        batch.n_tokens = len(entries)
        for row, (token, place, sequence, wanted) in enumerate(entries):
            batch.token[row], batch.pos[row] = token, place
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = wanted
        code = self._lib.llama_decode(self._context, batch)
        if code == 1:
            raise Refused("llama.cpp finds no free place in its KV cache")
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, row: int) -> Any:
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def _greedy(self, row: int) -> int:
        return int(self._logits(row).argmax())

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _quiet(self) -> None:
        """Send its warnings and errors to standard error; the callback is kept, as it is called later."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

        def log(level: int, text: bytes, _: Any) -> None:
            if level >= 3:  # warnings and errors
                os.write(2, text)

        self._log = kind(log)
        self._lib.llama_log_set(self._log, ctypes.c_void_p())
