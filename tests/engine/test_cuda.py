"""The equality checks on a CUDA device, and the script that runs them without pytest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_check
from benchmarks.equality import FAMILIES, Check, checks, full_precision
from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.engine_models import Family, prompts


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_family_answers_on_cuda_as_transformers(name: str, tmp_path: Path) -> None:
    full_precision()
    failed = [check for check in checks("cuda", name, tmp_path) if not check.passed]
    assert not failed


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
def test_cuda_runs_are_repeatable(schedule: str, llama: Family, offload: Path) -> None:
    """The same run many times: copies in the wrong order would change answers."""
    policy = Policy.parse(
        "weights=0.2/0.4/0.4,kv=0.2/0.4/0.4,activations=0.2/0.4/0.4,kv_quant=4,"
        f"device_batch=2,num_device_batches=4,schedule={schedule}"
    )
    requests = [Request(prompt, 8) for prompt in prompts()]
    with Engine(llama.folder, policy, offload_dir=offload, device="cuda") as engine:
        first = [output.tokens for output in engine.answer(requests)]
        for _ in range(20):
            assert [output.tokens for output in engine.answer(requests)] == first


def test_script_runs_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cuda_check.main(
        "--device pretend --families llama --shape tiny --prompt-len 9 --gen-len 3 --device-batch 2 "
        f"--num-device-batches 2 --offload-dir {tmp_path / 'off'} --json {tmp_path / 'out.json'}".split()
    )
    printed = capsys.readouterr().out
    assert code == 0 and "14 of 14 comparisons are equal" in printed
    for policy in cuda_check.POLICIES:
        assert policy in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["equality"]) == 14 and written["kind"] == "measured"
    assert all(row["record"]["totals"]["generated_tokens"] == 12 for row in written["throughput"])
    assert list((tmp_path / "off").iterdir()) == []


def test_script_fails_where_answers_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.equality.checks", lambda *_: iter([Check("llama", "disk", 0.5, 1e-4, 2)]))
    assert cuda_check.main(["--device", "cpu", "--families", "llama", "--skip-throughput"]) == 1
    assert "DIFFERS  llama: disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", ["--shape 9x", "--policies none", "--families none", "--device-memory lots", "--device tpu"]
)
def test_script_refuses_in_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    skip = "--skip-throughput" if "families" in arguments else "--skip-equality"
    assert cuda_check.main(["--device", "cpu", skip, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_script_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_check.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--device pretend" in error


def test_a_policy_that_does_not_fit_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device pretend --skip-equality --shape tiny --prompt-len 5 --gen-len 2 --policies resident"
    assert cuda_check.main([*arguments.split(), "--device-memory", "1MiB"]) == 0
    assert "not run: the policy" in capsys.readouterr().out
