"""The lower bounds of a pass against numbers counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import OPTConfig

from benchmarks.bounds import Rates, Work, bound, kept_bytes, pass_work
from benchmarks.passes import past_filled, set_block, timed
from engine.engine import Engine
from engine.spec.kv_layout import kv_layers
from engine.spec.model import TensorSpec
from engine.spec.policy import Policy
from engine.spec.request import Request

FRESH, PAST = [3, 1], [0, 5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An OPT of two layers: width 8, inner width 16, two heads, 32 words, tied, float16."""
    OPTConfig(
        num_hidden_layers=2, hidden_size=8, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=8,
        vocab_size=32, max_position_embeddings=1024, dtype="float16", architectures=["OPTForCausalLM"],
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


def work_of(folder: Path, policy: str) -> tuple[Work, int]:
    """The work of one pass, and the bytes of one token's keys and values at one layer."""
    parsed = Policy.parse(f"{policy},device_batch=2,num_device_batches=1")
    with Engine(folder, parsed, weights="random", offload_dir=folder / "offload", device="cpu") as engine:
        plan = engine.check([Request((1,) * 6, 2)] * 2)
        work = pass_work(engine.spec, engine.policy, plan, FRESH, PAST)
        return work, kv_layers(engine.spec, engine.policy)[0].row_bytes


def test_products_and_attention(folder: Path) -> None:
    work, _ = work_of(folder, "weights=host,kv=host")
    assert work.layer_flops == 2 * 2 * (4 * 8 * 8 + 2 * 8 * 16) * 4  # two layers, four tokens
    assert work.head_flops == 2 * 32 * 8 * 2  # one position of each sequence
    assert work.attention_flops == 2 * 2 * 2 * 8 * (1 + 2 + 3 + 6)  # scores and values, width 8


def test_bytes(folder: Path) -> None:
    layer = 4 * 8 * 8 + 2 * 8 * 16 + (4 * 8 + 16 + 8) + 2 * 2 * 8  # matrices, biases, two norms
    rows = 4 * 8  # rows of the position embeddings, for four tokens
    weights = 2 * (2 * layer + 32 * 8 + 2 * 8 + rows)  # the tied table once, the last norm, two bytes each
    work, row = work_of(folder, "weights=host,kv=host")
    assert work.weight_bytes == weights
    assert work.kv_bytes == 2 * (5 + 3 + 1) * row  # two layers: what is read, what is written
    assert (work.disk_read, work.disk_write) == (0, 0)
    work, _ = work_of(folder, "weights=disk,kv=disk")
    assert (work.disk_read, work.disk_write) == (weights, 0)  # too few tokens to fill a unit on disk


def test_a_head_that_stays_is_not_read_again(tmp_path: Path) -> None:
    OPTConfig(
        num_hidden_layers=2, hidden_size=8, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=8,
        vocab_size=40_000, max_position_embeddings=1024, dtype="float16", architectures=["OPTForCausalLM"],
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    work, _ = work_of(tmp_path / "model", "weights=disk")
    assert work.weight_bytes - work.disk_read == 2 * (40_000 * 8 + 2 * 8)  # the tied table and the last norm


def test_cache_on_disk_moves_whole_units(folder: Path) -> None:
    policy = Policy.parse("kv=disk,device_batch=1,num_device_batches=1")
    with Engine(folder, policy, weights="random", offload_dir=folder / "offload", device="cpu") as engine:
        plan = engine.check([Request((1,) * 900, 2)])
        assert plan.kv_slot is not None
        unit = plan.kv_slot.units[0]
        tokens = unit // kv_layers(engine.spec, policy)[0].row_bytes  # that fill one
        work = pass_work(engine.spec, policy, plan, [1], [2 * tokens - 1])
        assert (work.disk_read, work.disk_write) == (2 * unit, 2 * unit)  # of each of two layers
        work = pass_work(engine.spec, policy, plan, [1], [2 * tokens])
        assert (work.disk_read, work.disk_write) == (4 * unit, 0)


def test_packed_weights_count_packed() -> None:
    matrix = TensorSpec("layer.weight", (64, 128), "float16", compressible=True)
    assert kept_bytes(matrix, Policy()) == 2 * 64 * 128
    assert 4 < 8 * kept_bytes(matrix, Policy.parse("weight_quant=4")) / (64 * 128) <= 5  # bits, with scales


def test_packed_cache_counts_blocks_and_exact_rows(folder: Path) -> None:
    work, row = work_of(folder, "weights=host,kv=host,kv_quant=4-g32+2")
    policy = Policy.parse("kv_quant=4-g32+2")
    assert policy.kv_quant is not None
    block = policy.kv_quant.block_bytes(8, 8)
    read = 3 * block + 2 * row  # five tokens, the last two exact
    # Three fresh tokens fill one block and leave two rows; one more fills one and leaves itself.
    assert work.kv_bytes == 2 * (read + block + 2 * row + block + row)


def test_bound_is_the_busiest_stream() -> None:
    work = Work(
        disk_read=400, disk_write=100, weight_bytes=1000, kv_bytes=3000, layer_flops=5000, head_flops=600,
        attention_flops=1000,
    )  # fmt: skip
    rates = Rates(disk_read=100, disk_write=100, memory=1000, layers=2000, head=600)
    found = bound(work, rates)
    assert found.streams == {"disk read": 4.0, "disk write": 1.0, "memory": 4.0, "compute": 4.0}
    assert found.seconds == 4.0
    assert found.in_order == 2.5 + 1 + 3  # products, then the cache at the rate of memory
    assert bound(work, rates.mean(Rates(300, 100, 1000, 2000, 600))).stream == "memory"
    nothing = Work(0, 0, 1000, 0, 0, 0, 0)
    assert bound(nothing, Rates(0, 0, 1000, 2000, 600)).seconds == 1.0  # a stream that was not measured


@pytest.mark.parametrize("policy", ["kv=host", "kv=disk", "kv=host,kv_quant=4-g32", "weights=disk,kv=disk"])
def test_filled_past_is_decoded_from_at_once(
    folder: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(folder, Policy.parse(policy), weights="random", offload_dir=folder / "offload") as engine:
        set_block(engine, 4, 2, 20, filled=True)
        computed = []
        embed = engine._model.embed
        monkeypatch.setattr(
            engine._model,
            "embed",
            lambda ids, positions, *lengths: computed.append(positions) or embed(ids, positions, *lengths),
        )
        with past_filled():
            seconds = timed(engine, [Request((5,) * 20, 3)] * 8)
        assert len(seconds) == 3
        assert all(second > 0 for second in seconds)
        assert [positions.tolist() for positions in computed] == [
            [[19 + step] * 4] for step in (0, 0, 1, 1, 2, 2)
        ]
        timed(engine, [Request((5,) * 20, 2)] * 4)  # and prompts are computed again
        assert computed[6].tolist() == [list(range(20))]
