"""Results survive an interruption; the report picks what was repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.limits_report import cells_of, report
from benchmarks.python_time import KINDS, kind_of, profile_passes, sum_kinds
from benchmarks.records import RepetitionLog
from benchmarks.script import run
from benchmarks.synthetic import checkpoint, config_of
from engine.engine import Engine
from engine.errors import UsageError
from engine.kernels.cpu import native
from engine.spec.policy import Policy
from engine.spec.request import Request


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    log = RepetitionLog(path, ("cell", "repeat"))
    log.add({"cell": "a", "repeat": 0, "ratio": 0.9})
    again = RepetitionLog(path, ("cell", "repeat"))
    assert again.has({"cell": "a", "repeat": 0})
    assert not again.has({"cell": "a", "repeat": 1})
    assert again.rows[0]["ratio"] == 0.9
    again.add({"cell": "a", "repeat": 1, "skipped": "too slow just now", "again": True})
    assert not again.has({"cell": "a", "repeat": 1})
    assert not RepetitionLog(path, ("cell", "repeat")).has({"cell": "a", "repeat": 1})


def test_what_another_machine_did_is_done_here_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(records, "machine", lambda: "another one")
        RepetitionLog(path, ("cell",)).add({"cell": "a"})
    log = RepetitionLog(path, ("cell",))
    assert not log.has({"cell": "a"}) and not log.rows
    log.add({"cell": "a"})
    assert [row["machine"] for row in records.read_rows([path])] == ["another one", records.machine()]


def test_a_line_cut_short_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RepetitionLog(path, ("cell", "repeat"))
    log.add({"cell": "a", "repeat": 0})
    log.add({"cell": "a", "repeat": 1})
    path.write_bytes(path.read_bytes()[:-20])
    again = RepetitionLog(path, ("cell", "repeat"))
    assert again.has({"cell": "a", "repeat": 0})
    assert not again.has({"cell": "a", "repeat": 1})
    again.add({"cell": "a", "repeat": 1})
    assert [json.loads(line)["repeat"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(UsageError("no such shape"), 2, "error: no such shape"), (KeyboardInterrupt(), 130, "stopped;")],
)
def test_a_script_ends_in_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    shown = capsys.readouterr().err
    assert end.value.code == code and shown.startswith(said) and shown.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        run(lambda: 7)
    assert end.value.code == 7


def measured(block: str, repeat: int, ratio: float, **other: Any) -> dict[str, Any]:
    """A line in the format of limits.py."""
    rates = {"layers": 10.0, "memory": 10.0, "disk_read": 10.0, "disk_write": 10.0}
    row = {
        "shape": "125m", "layers": None, "setting": "all in RAM", "variant": "weights=host,kv=host",
        "kind": "decode", "prompt": 128, "context": 128, "block": block, "repeat": repeat, "ratio": ratio,
        "in_order_ratio": ratio, "stream": "compute", "seconds": [1.0], "sequences": 4,
        "cold": "posix_fadvise", "machine": "m", "before": rates, "after": rates,
        "streams": {"compute": ratio, "disk read": 0.2},
    }  # fmt: skip
    return {**row, **other}


def test_report_takes_the_repeated_block_and_the_least_of_the_sweep() -> None:
    rows = [measured("1x1", 0, 0.5), measured("4x1", 0, 0.8), *(measured("4x1", n, 0.9) for n in (1, 2))]
    (cell,) = cells_of(rows)
    assert (cell.decode.block, cell.decode.ratios, cell.decode.least) == ("4x1", [0.8, 0.9, 0.9], 0.5)
    assert not cell.prefill.rows
    text = report([cell], rows)
    assert "| 0.90 (0.80 to 0.90) | 4x1 |" in text
    assert "at least 0.85 with the best block in 1 of 1, at least 0.7 with every block in 0." in text


def test_report_does_not_count_what_cannot_be() -> None:
    rows = [measured("4x1", 0, 1.4), {**measured("8x1", 0, 0.0), "skipped": "does not fit"}]
    del rows[1]["ratio"]
    text = report(list(cells_of(rows)), rows)
    assert "with the best block in 0 of 1" in text
    assert "1 of 1 repetitions" in text
    assert "does not fit" in text


def test_a_run_is_bound_by_the_stream_that_has_most_to_do_in_all_of_it() -> None:
    """127 decode passes in which the disk is busy, after a prefill in which it has little to do."""
    streams = {"compute": 0.1, "disk read": 0.8}
    rows = [
        measured("1x1", 0, 0.8, seconds=[1.0], streams=streams),
        measured("1x1", 0, 0.9, kind="prefill", context=0, seconds=[10.0], sequences=1,
                 streams={"compute": 9.0, "disk read": 0.8}),
    ]  # fmt: skip
    (cell,) = cells_of(rows)
    assert cell.run.block == "1x1" and cell.run.ratio == pytest.approx(128 * 0.8 / (127 * 1.0 + 10.0))
    assert f"| {cell.run.ratio:.2f} | 1x1 |" in report([cell], rows)


def test_a_run_repeats_the_prefill_of_a_smaller_block() -> None:
    """Where its own was not measured; the smaller block's disk counts once, so that the bound is one."""
    rows = [
        measured("4x1", 0, 0.5, seconds=[1.0], streams={"compute": 0.5, "disk read": 0.2}),
        measured("2x1", 0, 0.9, kind="prefill", context=0, seconds=[10.0], sequences=2,
                 streams={"compute": 9.0, "disk read": 3.0}),
    ]  # fmt: skip
    (cell,) = cells_of(rows)
    assert cell.run.block == "4x1"
    assert cell.run.ratio == pytest.approx((2 * 9.0 + 127 * 0.5) / (2 * 10.0 + 127 * 1.0))
    assert not next(iter(cells_of(rows[1:]))).run.ratio > 0, "no decoding, no run"


def test_report_projects_token_rates() -> None:
    rows = [
        measured("4x1", 0, 0.9, seconds=[0.5], sequences=4),
        measured("1x1", 0, 0.9, kind="prefill", context=0, seconds=[2.0], sequences=1),
    ]
    (cell,) = cells_of(rows)
    assert cell.projected() == f"{4 * 128 / (4 * 2.0 + 127 * 0.5):.2f}"


def test_self_times_count_for_whoever_calls() -> None:
    engine = str(Path(__file__).resolve().parents[2] / "engine" / "executor.py")
    stats = {
        (engine, 1, "run_pass"): (1, 1, 2.0, 9.0, {}),
        (engine.replace("executor", "kernels/cpu/native"), 1, "attention"): (1, 1, 4.0, 4.0, {}),
        ("/x/transformers/modeling_opt.py", 1, "forward"): (1, 1, 1.0, 1.0, {}),
        ("~", 0, "<built-in method torch.empty>"): (1, 1, 0.5, 0.5, {}),
        ("~", 0, "<built-in method posix.preadv>"): (1, 1, 0.25, 0.25, {}),
        ("~", 0, "<built-in method builtins.len>"): (
            2, 2, 3.0, 3.0, {(engine, 1, "run_pass"): (1, 1, 1.0, 1.0),
                             ("/x/transformers/modeling_opt.py", 1, "forward"): (1, 1, 2.0, 2.0)},
        ),
    }  # fmt: skip
    assert list(sum_kinds(stats).values()) == [3.0, 3.0, 4.5, 0.25]


def test_calls_of_the_kernels_count_as_kernels() -> None:
    files = list(Path(native.__file__).parent.glob("*.py"))
    assert len(files) >= 3
    assert {kind_of((str(file), 1, "anything")) for file in files} == {KINDS[2]}


def test_all_passes_but_the_first_are_profiled(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "tiny", 1)
    with Engine(model, Policy(), offload_dir=tmp_path / "offload", device="cpu") as engine:
        kinds, passes = profile_passes(engine, [Request((5, 6, 7), 4)])
    assert passes == 3
    assert kinds[KINDS[0]] > 0 and kinds[KINDS[2]] > 0


@pytest.mark.parametrize("layers", [None, 1])
def test_synthetic_checkpoint_is_one_that_transformers_reads(tmp_path: Path, layers: int | None) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path, "tiny", layers)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == config_of("tiny", layers).num_hidden_layers
    assert model.model.decoder.layers[0].fc1.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoint(tmp_path, "tiny", layers) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
