"""Freed memory is kept during a run, so that passes cause no page faults, and is given back afterwards."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig

from engine.engine import Engine
from engine.memory.allocator import Overhang, give_back, keep_freed_memory, private_bytes
from engine.spec.policy import Policy
from engine.spec.request import CallProgress, Request

FEW = 300
"""Page faults of a pass that are nobody's temporaries: a few objects of Python's, buffers of the system's."""

CHILD = """
import resource, sys, torch
from engine.memory.allocator import give_back, keep_freed_memory
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
if sys.argv[1] != "never":
    assert keep_freed_memory()
if sys.argv[1] == "undone":
    assert keep_freed_memory(False)
x = torch.ones(12 << 20)
for _ in range(8):
    x + 1
before = faults()
for _ in range(20):
    x + 1
held = resident()
give_back()
print(faults() - before, held - resident())
"""

glibc = pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")


@glibc
@pytest.mark.parametrize("way", ["kept", "never", "undone"])
def test_results_of_48_mib_are_touched_once_only_if_kept(way: str) -> None:
    command = [sys.executable, "-c", CHILD, way]
    faults, given = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    if way == "kept":  # a small block that was placed in the freed one may cost a new page now and then
        assert faults < 2 * 12_288 + FEW and given > 40 << 20
    else:
        assert faults > 20 * 12_000 and given < 8 << 20


@glibc
@pytest.mark.parametrize("policy", ["weights=device", "weights=disk,kv=disk,activations=disk"])
def test_decode_passes_take_no_page_faults(policy: str, tmp_path: Path, offload: Path) -> None:
    """A pass has temporaries of up to 1 MiB; each would cause 256 page faults if memory were not kept."""
    OPTConfig(
        hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_attention_heads=4, num_hidden_layers=2,
        vocab_size=1000, max_position_embeddings=64,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    passes: dict[int, int] = {}

    def note(progress: CallProgress) -> None:
        if progress.pass_done == 1:
            passes[progress.passes] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    shaped = Policy.parse(f"{policy},device_batch=256,num_device_batches=1")
    with Engine(tmp_path / "model", shaped, offload_dir=offload, device="cpu", weights="random") as engine:
        engine.answer([Request((5, 6, 7, 8), 9)] * 256, on_progress=note)
    per_pass = [passes[number + 1] - passes[number] for number in range(3, 9)]
    assert sum(per_pass) < FEW * len(per_pass), per_pass


def test_giving_back_is_harmless() -> None:
    kept = torch.ones(1 << 20)
    give_back()
    assert float(kept.sum()) == 1 << 20


@glibc
def test_what_is_freed_in_pieces_goes_back_once_a_process_holds_more_than_its_own() -> None:
    kept = keep_freed_memory()
    try:
        accounted = [0]
        give_back()
        overhang = Overhang(lambda: accounted[0])
        own = private_bytes()
        pieces = [torch.ones(1 << 18) for _ in range(64)]  # 64 MiB, of which every other one is freed
        del pieces[::2]
        assert private_bytes() > own + (60 << 20)
        assert overhang.trim()
        held = private_bytes()
        assert own + (28 << 20) < held < own + (40 << 20), "what is in use stays"
        assert not overhang.trim(), "and is not looked for again"
        accounted[0] = 16 << 20
        more = torch.ones(1 << 21)  # 8 MiB that the ledger knows
        assert not overhang.trim()
        del more, pieces
    finally:
        keep_freed_memory(not kept)
        give_back()


@glibc
def test_passes_trim_a_process_that_has_grown_past_its_plan(
    tmp_path: Path, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB that the ledger does not know stand for fragments of freed memory, before the second pass."""
    OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=100, max_position_embeddings=64,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    trimmed: list[bool] = []
    trim = Overhang.trim
    monkeypatch.setattr(Overhang, "trim", lambda self: trimmed.append(trim(self)) or trimmed[-1])

    def grow(progress: CallProgress) -> None:
        if progress.passes == 1 and progress.pass_done == 1:
            torch.ones(1 << 24)

    with Engine(tmp_path / "model", Policy(), weights="random", offload_dir=offload) as engine:
        engine.answer([Request((1, 2, 3), 6)], on_progress=grow)
    assert len(trimmed) == 6 and trimmed[1] and not any(trimmed[3:])
