"""The judged policies are many, varied and well formed, and their errors are counted as they should be."""

from __future__ import annotations

from pathlib import Path

from benchmarks.prediction import CASES, PolicyCase, judgements, plot, report
from engine.spec.policy import Policy


def row(case: PolicyCase, repeat: int, measured: float, predicted: float) -> dict[str, object]:
    """A line of the log; the unscaled profile predicts twice as long as the scaled one."""
    times = {"measured": measured, "predicted": predicted, "unpaced": 2 * predicted, "passes": 1}
    return {
        **case.name,
        "name": case.name,
        "profile": "here",
        "repeat": repeat,
        "prefill": times,
        "decode": times,
    }


def test_at_least_thirty_policies_of_two_models_over_all_kinds() -> None:
    policies = [Policy.parse(case.policy) for case in CASES]
    assert len({str(case) for case in CASES}) == len(CASES) >= 30
    assert len({case.shape for case in CASES}) == 2
    assert {policy.weights.disk for policy in policies} >= {0, 0.5, 1}
    assert any(policy.kv.disk for policy in policies) and any(policy.activations.disk for policy in policies)
    assert {str(policy.weight_quant) for policy in policies} == {"16", "4", "8"}
    assert len({(case.batch, case.batches) for case in CASES}) > 10 and len({c.prompt for c in CASES}) > 8


def test_errors_are_those_of_medians_of_repetitions(tmp_path: Path) -> None:
    rows = [row(CASES[0], i, measured, 1.1) for i, measured in enumerate((1.0, 9.0, 1.0))]
    rows += [row(CASES[5], 0, 2.0, 1.6)]
    assert [round(judged.error, 3) for judged in judgements(rows)] == [0.1, 0.1, -0.2, -0.2]
    text = report(rows)
    assert "2 policies, 4 pass times: mean absolute error 15.0%" in text
    assert "worst 20.0%, 0 beyond 25%" in text and "worst 120.0%, 4 beyond 25%" in text
    assert "266.7% from their median on average" in text, (
        "what the machine itself differs by: (0 + 8 + 0) / 3"
    )
    plot(rows, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 5000
    assert report([]) == "nothing was measured yet"
