"""Runs complete under a real limit of the planned memory plus the interpreter's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig

from tests.support.cgroup import MemoryGroup, memory_group

pytestmark = pytest.mark.timeout(240)

CHILD = """
import json, sys
import torch
from pathlib import Path
from engine.engine import Engine
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Request

torch.set_num_threads(1)
folder, offload, policy, count = sys.argv[1:]
requests = [Request(tuple(range(5, 5 + 20)), 6) for _ in range(int(count))]
def say(**what):
    print(json.dumps(what), flush=True)
chosen = Policy.parse(policy)
with Engine(folder, chosen, offload_dir=Path(offload), device="cpu", weights="random") as engine:
    plan = engine.check(requests)
    say(planned=plan.total(Tier.DEVICE) + plan.total(Tier.HOST), model=4 * engine.spec.num_parameters)
    sys.stdin.readline()
    outputs = engine.answer(requests)
    say(tokens=sum(len(output.tokens) for output in outputs), disk=engine._tiers.pool.describe())
"""

REQUESTS = 8
SLACK = 4 << 20
"""What the process grows by between the measurement of its base and the engine's own look."""

POLICIES = {
    "all on disk": "weights=disk,kv=disk,activations=disk",
    "packed on disk": "weights=disk,weight_quant=4",
}


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with memory_group("tierbench-test") as made:
        if isinstance(made, str):
            pytest.skip(made)
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of an OPT of 125M parameters; its weights are made by the engine."""
    folder = tmp_path_factory.mktemp("model")
    OPTConfig(
        hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_attention_heads=12, num_hidden_layers=12,
        max_position_embeddings=128,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@dataclass
class Capped:
    """How a child under a limit ended."""

    code: int
    output: dict[str, Any]
    base: int
    planned: int
    limit: int
    model: int


def run_capped(group: MemoryGroup, model: Path, offload: Path, policy: str, part: float) -> Capped:
    """Run a child whose memory is limited, after its engine is built, to a share of what it should need."""
    join = "import os, sys; from tests.support.cgroup import MemoryGroup; from pathlib import Path; "
    join += f"MemoryGroup(Path({str(group.folder)!r}), {group.version}).join(os.getpid()); "
    command = [
        sys.executable,
        "-c",
        join + f"exec({CHILD!r})",
        str(model),
        str(offload),
        policy,
        str(REQUESTS),
    ]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        said = json.loads(child.stdout.readline())
        base = group.held
        limit = int((said["planned"] + base) * part) + SLACK
        group.limit(limit)
        child.stdin.write("go\n")
        child.stdin.flush()
        line = child.stdout.readline()
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    output = json.loads(line) if line else {}
    return Capped(code, output, base, said["planned"], limit, said["model"])


@pytest.mark.parametrize("policy", POLICIES)
def test_runs_complete_within_plan_and_base(
    policy: str, group: MemoryGroup, model: Path, offload: Path
) -> None:
    capped = run_capped(group, model, offload, POLICIES[policy], 1.0)
    assert (capped.code, group.kills) == (0, 0), capped
    assert capped.output["tokens"] == 6 * REQUESTS
    assert list(offload.iterdir()) == []


def test_half_of_it_is_not_enough(group: MemoryGroup, model: Path, offload: Path) -> None:
    """It is refused, as with a budget: nobody is killed."""
    capped = run_capped(group, model, offload, POLICIES["all on disk"], 0.5)
    assert (capped.code, group.kills) == (1, 0) and not capped.output, capped
