"""The precision of products is part of a plan's prediction."""

from __future__ import annotations

from engine.prediction import simulate_shipped
from engine.spec.policy import Policy
from engine.spec.precision import VECTOR_ROWS, MatmulPrecision
from engine.spec.profile import HardwareProfile
from engine.spec.rates import RateTable
from tests.support.profiles import make_profile

PLAIN = RateTable.line({1: 1e9, 64: 4e9})
FASTER, BETWEEN = RateTable.line({32: 16e9, 64: 32e9}), RateTable.line({32: 8e9})
PROFILE = make_profile(
    unified=True, products={"float32": PLAIN, "float32@medium": FASTER, "float32@high": BETWEEN}
)


def seconds(precision: str, profile: HardwareProfile = PROFILE, batch: int = 64) -> tuple[float, float]:
    policy = Policy.parse(
        f"matmul_precision={precision},weights=device,kv=device,device_batch={batch},num_device_batches=1,max_batch_tokens=4096"
    )
    estimate = simulate_shipped("opt-125m", policy, [(32, 4)] * batch, profile).estimate
    return estimate.prefill_seconds, estimate.decode_seconds


def test_each_precision_has_rates_of_its_own() -> None:
    (fast, _), (usual, _), (exact, _) = (seconds(str(p)) for p in ("medium", "high", "highest"))
    assert fast < 0.5 * usual < 0.5 * 0.8 * exact


def test_few_rows_are_the_same_at_every_precision() -> None:
    found = {seconds(str(precision), batch=VECTOR_ROWS)[1] for precision in MatmulPrecision}
    assert len(found) == 1
    assert seconds("medium", batch=VECTOR_ROWS + 1)[1] < seconds("highest", batch=VECTOR_ROWS + 1)[1]


def test_without_rates_of_its_own_a_precision_computes_as_the_usual_one() -> None:
    alike = make_profile(unified=True, products={"float32": PLAIN})
    assert len({seconds(str(precision), alike) for precision in MatmulPrecision}) == 1


def test_the_nearest_form_counts_and_its_precision() -> None:
    profile = make_profile(unified=True, products={"float32": PLAIN, "4": BETWEEN, "4@medium": FASTER})
    assert profile.product("3") is profile.products["4"]
    assert profile.product("3", MatmulPrecision.MEDIUM) is profile.products["4@medium"]
    assert profile.product("float16", MatmulPrecision.MEDIUM) is profile.products["float32"]
    assert HardwareProfile.from_dict(profile.to_dict()) == profile
