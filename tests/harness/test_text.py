"""Tokenizers: bytes of tokens, stop strings, first and last tokens of texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, UsageError
from engine.spec.request import Output
from harness.detokenizer import LeftOut, text_of
from harness.tokenizer import Text, generated_pieces, require_stop_strings, shown
from tests.support.tiny_models import bare_byte_level_tokenizer, save_tiny_sentencepiece
from tests.support.tiny_tokenizers import KINDS, panics, repeats_dropped, wordpiece


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
    assert sentencepiece.join(tokens) == "the apple é".encode()
    assert sentencepiece.token_bytes(tokens[0]) == b" ", "in the middle of a text"
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


def with_configs(source: Path, folder: Path, generation: str | None, config: str | None) -> str:
    """The tokenizer of a model beside other configs, of which None is left out."""
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, None, {2}),
        ('{"eos_token_id": [2, 7]}', None, {2, 7}),
        ('{"eos_token_id": 9}', '{"model_type": "opt", "eos_token_id": [2, 7]}', {2, 9}),
        ("{}", '{"model_type": "opt", "eos_token_id": [2, 7]}', {2}),
        (None, '{"model_type": "opt", "eos_token_id": [2, 7]}', {2, 7}),
        (None, '{"model_type": "opt", "eos_token_id": 8}', {2, 8}),
        (None, '{"model_type": "opt", "eos_token_id": null}', {2}),
        (None, '{"model_type": "llava", "text_config": {"model_type": "opt", "eos_token_id": 5}}', {2, 5}),
        (None, '{"model_type": "opt", "eos_token_id": -1}', {2}),
    ],
)
def test_ends_are_those_of_transformers(
    tiny_opt_dir: Path, tmp_path: Path, generation: str | None, config: str | None, ends: set[int]
) -> None:
    assert Text.load(with_configs(tiny_opt_dir, tmp_path, generation, config)).end_ids == ends


@pytest.mark.parametrize(
    ("generation", "config", "said"),
    [
        ('{"eos_token_id": [2, ', None, "generation_config.json of"),
        ("", None, "generation_config.json of"),
        ("[]", None, "generation_config.json of"),
        ("\x00\x01", None, "generation_config.json of"),
        ("[" * 100_000, None, "generation_config.json of"),
        ('{"eos_token_id": "</s>"}', None, "eos_token_id='</s>', which is no token id"),
        ('{"eos_token_id": [2, true]}', None, "which is no token id"),
        ('{"eos_token_id": [[2]]}', None, "which is no token id"),
    ],
)
def test_a_damaged_list_of_ends_is_one_line(
    tiny_opt_dir: Path, tmp_path: Path, generation: str | None, config: str | None, said: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        Text.load(with_configs(tiny_opt_dir, tmp_path, generation, config))
    assert "\n" not in str(caught.value) and "mend it" in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_list_of_ends_that_is_no_file_is_not_passed_over(
    tiny_opt_dir: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json of"):
        Text.load(with_configs(tiny_opt_dir, tmp_path, None, '{"model_type": "opt"}'))


@pytest.fixture(scope="module")
def of_kind() -> Callable[[str], Text]:
    """The tiny tokenizer of a kind, made once."""
    return cache(lambda kind: Text(KINDS[kind]()))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_tokens_one_by_one_are_what_the_tokenizer_decodes(
    of_kind: Callable[[str], Text], kind: str, data: st.DataObject, skip: bool
) -> None:
    codec = of_kind(kind)
    ids = data.draw(st.lists(st.integers(0, len(codec.tokenizer) + 3), max_size=12))
    cut = data.draw(st.integers(0, len(ids)))
    whole = codec.tokenizer.decode(ids, skip_special_tokens=skip)
    assert text_of(codec.pieces(ids, skip_special=skip)) == whole
    after = codec.pieces(ids[cut:], context=ids[:cut], skip_special=skip)
    assert text_of([*codec.pieces(ids[:cut], skip_special=skip), *after]) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_every_kind_passes_the_check_at_load(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save_pretrained(tmp_path)
    codec = Text.load(str(tmp_path))
    ids = codec.encode("hello the world")
    assert text_of(codec.pieces(ids)) == codec.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (repeats_dropped, "does not decode token by token"),
        (panics, "does not decode token by token"),
        (lambda: wordpiece(clean_up=True), "set that to false"),
    ],
)
def test_a_tokenizer_that_decodes_only_whole_texts_is_refused(
    make: Callable[[], Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        Text.load(str(tmp_path))
    assert "\n" not in str(caught.value) and "panic" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stop_check_reads_the_text_that_is_decoded(
    of_kind: Callable[[str], Text], kind: str, data: st.DataObject, skip: bool
) -> None:
    codec = of_kind(kind)
    ids = data.draw(st.lists(st.integers(0, len(codec.tokenizer) - 1), min_size=1, max_size=10))
    context = data.draw(st.lists(st.integers(0, len(codec.tokenizer) - 1), max_size=3))
    stop = data.draw(st.sampled_from(["a", "o w", "ed", " ", "hello", "d the", ". "]))
    check = codec.stop_check([stop], context, skip)
    assert check is not None
    pieces = [b"" if isinstance(piece, LeftOut) else piece for piece in codec.pieces(ids, context, skip)]
    for count in range(1, len(ids) + 1):
        found = stop.encode() in b"".join(pieces[:count])
        assert check(ids[:count]) == found
        if found:
            break


def test_a_special_token_that_is_not_shown_still_ends_a_text(of_kind: Callable[[str], Text]) -> None:
    codec = of_kind("byte fallback")
    ids = (*codec.encode("hello"), codec.tokenizer.convert_tokens_to_ids("<sep>"))
    check = codec.stop_check(["<sep>"], skip_special=True)
    assert check is not None and check(ids) and not check(ids[:-1])
    output = Output((*ids, *codec.encode("a")), (-1.0,) * (len(ids) + 1), None, "stop", 1, 0.1)
    kept = generated_pieces(output, ["<sep>"], codec, skip_special=True)
    assert text_of([data for data, _ in kept]) == "hello" and len(kept) == len(ids) - 1


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
