"""Tokenizers: bytes of tokens, stop strings, first and last tokens of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, UsageError
from harness.tokenizer import Text, require_stop_strings, shown
from tests.support.tiny_models import bare_byte_level_tokenizer, save_tiny_sentencepiece


@pytest.fixture(scope="module")
def byte_level(tiny_opt_dir: Path) -> Text:
    return Text.load(str(tiny_opt_dir))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(str(save_tiny_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))))


@pytest.fixture(scope="module")
def gpt2_style() -> Text:
    return Text(bare_byte_level_tokenizer())


@pytest.mark.parametrize("name", ["byte_level", "gpt2_style"])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_bytes_of_tokens_join_to_the_text(request: pytest.FixtureRequest, name: str, text: str) -> None:
    codec: Text = request.getfixturevalue(name)
    if not any(special in text for special in ("<s>", "</s>", "<pad>", "<unk>", "<|endoftext|>")):
        assert codec.join(codec.encode(text)) == text.encode()


def test_sentencepiece_tokens_have_spaces_and_single_bytes(sentencepiece: Text) -> None:
    tokens = sentencepiece.encode("the apple é")
    assert (
        sentencepiece.join(tokens) == " the apple é".encode()
    )  # this tokenizer puts a space before the text
    assert [shown(sentencepiece.token_bytes(token)) for token in tokens[-2:]] == [
        "bytes:\\xc3",
        "bytes:\\xa9",
    ]


def test_partial_characters_are_shown_as_bytes(byte_level: Text) -> None:
    pieces = [shown(byte_level.token_bytes(token)) for token in byte_level.encode("€")]
    assert (
        pieces == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
        or "".join(pieces) == "bytes:\\xe2\\x82bytes:\\xac"
    )
    assert shown("мир".encode()) == "мир"


def test_beginnings_of_texts(byte_level: Text, sentencepiece: Text, gpt2_style: Text) -> None:
    assert (byte_level.start_ids, byte_level.scoring_prefix, byte_level.prefix_token) == ((2,), (2,), "</s>")
    assert (sentencepiece.start_ids, sentencepiece.prefix_token) == ((1,), "<s>")
    end = gpt2_style.tokenizer.eos_token_id
    assert (gpt2_style.start_ids, gpt2_style.scoring_prefix) == ((), (end,))
    assert gpt2_style.prefix_token == "<|endoftext|>"


def test_ends_come_from_the_generation_config_too(tiny_opt_dir: Path, tmp_path: Path) -> None:
    for file in tiny_opt_dir.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert Text.load(str(tmp_path)).end_ids == {2, 7}


def test_a_stop_string_is_found_across_token_borders(byte_level: Text) -> None:
    tokens = byte_level.encode("one###two")
    check = byte_level.stop_check(["###"])
    assert check is not None
    fires = [check(tokens[: n + 1]) for n in range(len(tokens))]
    complete = [b"###" in byte_level.join(tokens[: n + 1]) for n in range(len(tokens))]
    first = complete.index(True)
    assert not any(fires[:first]) and fires[first]
    assert byte_level.join(tokens[:first]).endswith(b"#"), (
        "the stop string is not one token, or this tests nothing"
    )


@given(
    text=st.text(alphabet="ab#é\n", min_size=1, max_size=24),
    stop=st.text(alphabet="ab#é\n", min_size=1, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_stop_check_fires_exactly_when_the_string_is_complete(byte_level: Text, text: str, stop: str) -> None:
    tokens, check = byte_level.encode(text), byte_level.stop_check([stop])
    assert check is not None
    for count in range(1, len(tokens) + 1):
        found = stop.encode() in byte_level.join(tokens[:count])
        assert check(tokens[:count]) == found
        if found:
            break


def test_without_stop_strings_there_is_no_check(byte_level: Text) -> None:
    assert byte_level.stop_check([]) is None


def test_an_empty_stop_string_is_refused() -> None:
    assert require_stop_strings(["b", "a", "b"]) == ("a", "b")
    with pytest.raises(UsageError, match="empty"):
        require_stop_strings(["a", ""])


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be loaded"):
        Text.load(str(tmp_path))
