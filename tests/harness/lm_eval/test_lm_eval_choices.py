"""Choices are encoded as by lm-eval's own class for transformers, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from engine.engine import Engine
from engine.errors import RequestError
from harness.lm_eval.model import EngineLM
from harness.progress.line import Progress
from harness.tokenizer import Text
from tests.support.tiny_models import save_tiny_gpt2


@pytest.fixture(scope="module")
def engine(tiny_opt_dir: Path) -> Iterator[Engine]:
    with Engine(tiny_opt_dir) as engine:
        yield engine


@pytest.fixture(scope="module")
def text(tiny_opt_dir: Path) -> Text:
    return Text.load(str(tiny_opt_dir))


def scored(model: Any, *pairs: tuple[str, str]) -> list[Any]:
    instances = [
        Instance("loglikelihood", {}, pair, 0, metadata=("mine", number, 1))
        for number, pair in enumerate(pairs)
    ]
    return list(model.loglikelihood(instances, disable_tqdm=True))


def test_choices_are_encoded_as_by_lm_evals_own_class(engine: Engine, text: Text, tiny_opt_dir: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    pairs = [
        ("Answer:", " Yes"), ("Answer: ", "Yes"), ("Answer:", " "), ("  \n", "Yes"), ("", "Yes"),
        ("", "</s>Yes"), ("The apple is r", "ed and"), ("</s>Answer:", " No"),
    ]  # fmt: skip
    hf = HFLM(pretrained=str(tiny_opt_dir), dtype="float32", device="cpu", batch_size=4)
    for ours, theirs in zip(
        scored(EngineLM(engine, text, 0, Progress()), *pairs), scored(hf, *pairs), strict=True
    ):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4) and ours[0] < 0
        assert ours[1] == theirs[1]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("of th", "e"), "mine, document 0: the choice 'e' after 'of th' has no token of its own"),
        (("Answer:", ""), "the choice '' after 'Answer:' has no token of its own"),
        (("", ""), "has no token of its own"),
        (("", "</s>"), "has no token of its own"),
    ],
)
def test_a_choice_without_a_token_is_refused_by_name(
    engine: Engine, text: Text, pair: tuple[str, str], said: str
) -> None:
    ids = text.encode("".join(pair))
    assert not pair[0] or len(ids) <= len(text.encode(pair[0])), "it melts, or this tests nothing"
    with pytest.raises(RequestError, match=re.escape(said)):
        scored(EngineLM(engine, text, 0, Progress()), pair)


def test_a_context_without_a_token_is_refused_by_name(tmp_path: Path) -> None:
    with Engine(save_tiny_gpt2(tmp_path)) as engine:
        lm = EngineLM(engine, Text.load(str(tmp_path)), 0, Progress())
        with pytest.raises(RequestError, match="document 0: the context '  ' has no token"):
            scored(lm, ("  ", "Yes"))
        assert scored(lm, ("", "Yes"))[0][0] < 0
