"""The paper's closed form gives its authors' own figures, to the last printed digit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.spec.policy import Placement, Policy
from engine.units import GIB
from tests.support.flexgen_closed_form import Constants, closed_form, opt_shape

MODELS = {"6.7b": (32, 4096, 32), "30b": (48, 7168, 56), "175b": (96, 12288, 96)}


def evaluate(model, prompt, batch, batches, percents, constants=None):
    w1, w2, c1, c2, h1, h2 = (percent / 100 for percent in percents)
    policy = Policy(
        weights=Placement(w1, w2, 1 - w1 - w2),
        kv=Placement(c1, c2, 1 - c1 - c2),
        activations=Placement(h1, h2, 1 - h1 - h2),
        device_batch=batch,
        num_device_batches=batches,
    )
    return closed_form(opt_shape(*MODELS[model], prompt, 32, policy), policy, constants)


# Printed by the authors' released cost model with its default constants.
GOLDEN = [
    ("30b", 512, 48, 3, (20, 80, 0, 100, 0, 100), "4.3890", "0.2924", "645.764", "7.14"),
    ("30b", 512, 48, 3, (0, 100, 0, 100, 0, 100), "4.3890", "0.3102", "672.279", "6.85"),
    ("30b", 1024, 20, 4, (4, 96, 0, 100, 0, 100), "4.9973", "0.3138", "706.798", "3.62"),
    ("30b", 256, 160, 2, (10, 90, 0, 100, 0, 100), "4.8163", "0.3752", "789.451", "12.97"),
    ("175b", 512, 32, 8, (0, 50, 0, 0, 0, 100), "22.6938", "17.0991", "53065.5", "0.15"),
    ("6.7b", 512, 2, 1, (100, 0, 100, 0, 100, 0), "0.0203", "0.0004", "1.0518", "60.85"),
]


@pytest.mark.parametrize("model,prompt,batch,batches,percents,prefill,decode,seconds,throughput", GOLDEN)
def test_whole(model, prompt, batch, batches, percents, prefill, decode, seconds, throughput):
    found = evaluate(model, prompt, batch, batches, percents)
    assert f"{found.prefill.seconds:.4f}" == prefill
    assert f"{found.decode.seconds:.4f}" == decode
    digits = len(seconds.partition(".")[2])
    assert f"{found.seconds:.{digits}f}" == seconds
    assert f"{found.throughput:.2f}" == throughput


TERMS = [
    ("30b", 48, 3, (20, 80, 0, 100, 0, 100), ".1476 2.2378 0 0 4.3890", ".0714 .0004 0 0 .2210"),
    ("30b", 48, 3, (0, 100, 0, 100, 0, 100), ".1655 2.2378 0 0 4.3890", ".0892 .0004 0 0 .2210"),
    ("175b", 32, 8, (0, 50, 0, 0, 0, 100), ".4946 6.8201 3.5677 8.0586 22.6938",
     ".2623 .0012 16.8368 .0058 .7742"),
]  # fmt: skip


@pytest.mark.parametrize("model,batch,batches,percents,prefill,decode", TERMS)
def test_terms(model, batch, batches, percents, prefill, decode):
    found = evaluate(model, 512, batch, batches, percents)
    for phase, printed in ((found.prefill, prefill), (found.decode, decode)):
        terms = (phase.to_device, phase.to_host, phase.disk_read, phase.disk_write, phase.compute)
        assert [f"{term:.4f}" for term in terms] == [f"{float(text):.4f}" for text in printed.split()]


def test_with_the_disk_that_the_paper_describes():
    constants = replace(Constants(), disk_read=2.0 * GIB)
    found = evaluate("175b", 512, 32, 8, (0, 50, 0, 0, 0, 100), constants)
    assert f"{found.prefill.disk_read:.4f}" == "0.8438"
    assert f"{found.decode.disk_read:.4f}" == "3.9819"
    assert f"{found.decode.seconds:.4f}" == "4.2442"
    assert f"{found.seconds:.1f}" == "14809.3"
    assert f"{found.throughput:.2f}" == "0.55"


def test_peaks():
    found = evaluate("30b", 512, 48, 3, (20, 80, 0, 100, 0, 100)).peak
    assert f"{found.device_prefill / GIB:.3f} {found.device_decode / GIB:.3f}" == "18.769 12.870"
    assert f"{found.host_prefill / GIB:.3f} {found.host_decode / GIB:.3f}" == "140.831 144.512"
    found = evaluate("175b", 512, 32, 8, (0, 50, 0, 0, 0, 100)).peak
    assert f"{found.device_prefill / GIB:.3f} {found.device_decode / GIB:.3f}" == "13.500 6.759"
    assert f"{found.host_prefill / GIB:.3f} {found.host_decode / GIB:.3f}" == "168.750 165.291"
    assert f"{found.disk / GIB:.1f}" == "774.0"


def test_packed_weights_are_a_quarter():
    policy = Policy()
    plain = opt_shape(*MODELS["30b"], 512, 32, policy)
    packed = opt_shape(*MODELS["30b"], 512, 32, policy, packed=True)
    assert packed.layer_bytes * 4 == plain.layer_bytes
    assert round(plain.layer_bytes * 48 / GIB, 3) == 55.125
