"""Which answers are valid, and how agreement with the reference is measured."""

from __future__ import annotations

import math

import pytest

from engine.errors import ModelError, UsageError
from harness.baselines.sandbox.child import ChildError
from harness.comparison.measure import agreement, checked, distance
from harness.comparison.options import MemoryCap, Model, Trial, prompts

TRIAL = Trial("ours", "full", {}, None, 2, 3, 2, "repeat")


def answer(**more: object) -> dict[str, object]:
    """A valid answer to `TRIAL`, which has 2 sequences and 2 new tokens, apart from ``more``."""
    return {"tokens": [[1, 2], [3, 4]], "prefill_s": 1.0, "decode_s": 2.0} | more


def test_a_right_answer_passes() -> None:
    checked(answer(), TRIAL, 10, 3.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": [[1, 2]]}, "2 sequences were asked for, 1 came"),
        ({"tokens": None}, "2 sequences were asked for, no came"),
        ({"tokens": [[1, 2], [3]]}, "2 tokens were asked for, 1 came"),
        ({"tokens": [[1, 2], [3, 4, 5]]}, "2 tokens were asked for, 3 came"),
        ({"tokens": [[1, 2], [3, 10]]}, "something other than token ids below 10"),
        ({"tokens": [[1, 2], [3, True]]}, "something other than token ids"),
        ({"prefill_s": None}, "are not seconds"),
        ({"prefill_s": -1.0}, "are not seconds"),
        ({"prefill_s": math.nan}, "are not seconds"),
        ({"prefill_s": 0, "decode_s": 0}, "are not seconds"),
        ({"prefill_s": 9.0}, "it reports 11.00 s, our clock 3.00 s"),
        ({"prefill_s": 0.01, "decode_s": 0.01}, "it reports 0.02 s, our clock 3.00 s"),
    ],
)
def test_a_wrong_answer_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ChildError, match=message):
        checked(answer(**wrong), TRIAL, 10, 3.0)


def test_agreement_ends_at_the_first_difference() -> None:
    right = {0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}
    assert agreement([[1, 2, 3, 4], [1, 2, 3, 4]], right, 4) == 1.0
    assert agreement([[1, 2, 9, 4], [9, 2, 3, 4]], right, 4) == 0.25  # the mean of 2/4 and 0/4
    assert agreement([[1, 2, 3, 9]], right, 4) == 0.75  # a batch of one
    assert agreement([[1, 2]], right, 2) == 1.0  # a probe asks for fewer
    assert agreement([[1]], {}, 1) is None


def test_distance_is_of_the_same_tokens() -> None:
    assert distance({"0": [-1.0, -2.0]}, {"0": [-1.5, -2.0], "1": [-9.0, -9.0]}) == 0.25  # mean of 0.5, 0
    assert distance({"3": [-1.0]}, {"0": [-1.5]}) is None


def test_prompts_do_not_depend_on_their_number() -> None:
    assert prompts(4, 6, 100, 7)[:2] == prompts(2, 6, 100, 7)
    assert prompts(1, 6, 100, 7) != prompts(1, 6, 100, 8)
    assert all(4 <= token < 100 for token in prompts(1, 500, 100, 0)[0])


def test_limits_of_memory_are_read() -> None:
    assert MemoryCap.parse("none", 1000).nbytes is None
    assert MemoryCap.parse("50%", 1000).nbytes == 500
    assert MemoryCap.parse("2GiB", 1000).nbytes == 2 << 30
    assert "50% of the model" in MemoryCap.parse("50%", 1 << 20).label
    for text in ("half", "0%", "-3"):
        with pytest.raises(UsageError, match="memory-cap"):
            MemoryCap.parse(text, 1000)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match=r"config\.json of .* cannot be used"):
        Model.read(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        Model.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    first = Model.read(tmp_path)
    assert (first.nbytes, first.vocabulary, len(first.digest)) == (5, 5, 64)
    (tmp_path / "model.safetensors").write_bytes(b"12346")
    assert Model.read(tmp_path).digest != first.digest
