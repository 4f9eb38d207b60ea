"""Tiny tokenizers of every kind, made on the spot: what a decoder does to its tokens differs between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = ("hello", "world", "play", "run", "the", "a", "and", "do", "not", "it", ".", ",", "!", "'", "s", "b")
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<sep>")
_SPACE = "\u2581"


def _fast(tokenizer: Any, **names: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    given = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    given["additional_special_tokens"] = ["<sep>"]  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(given | names))


def _numbered(*groups: Any) -> dict[str, int]:
    return {
        word: place for place, word in enumerate(dict.fromkeys(word for group in groups for word in group))
    }


def wordpiece(clean_up: bool = False) -> PreTrainedTokenizerFast:
    """BERT's: continued words begin with ``##``, the decoder puts spaces between words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = ("##ing", "##ed", "##s", "##un", "天", "气", "café")
    tokenizer = Tokenizer(models.WordPiece(_numbered(SPECIAL, WORDS, pieces), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <sep>", special_tokens=[("<s>", 2), ("<sep>", 4)]
    )
    return _fast(tokenizer, clean_up_tokenization_spaces=clean_up)


def word_ends() -> PreTrainedTokenizerFast:
    """GPT-1's: the last piece of a word ends in ``</w>``, after which the decoder puts a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(WORDS)))
    ends = [f"{letter}</w>" for letter in letters]
    merges, merged = [], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            merged.append(parts[0])
    tokenizer = Tokenizer(
        models.BPE(
            _numbered(SPECIAL, letters, ends, merged), list(dict.fromkeys(merges)), unk_token="<unk>",
            end_of_word_suffix="</w>",
        )
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _fast(tokenizer)


def unigram(scheme: str = "always") -> PreTrainedTokenizerFast:
    """T5's: pieces with scores, word marks; ``scheme`` says whether a text begins with a mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(WORDS)) | set("é天mирd"))
    pieces = [*SPECIAL, _SPACE, *letters, *(_SPACE + word for word in WORDS)]
    scored = [(piece, -float(20 - len(piece))) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _fast(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's: word marks, a token per byte for what is not in the vocabulary, the first space dropped."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = sorted(set("".join(WORDS)))
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE(
            _numbered(SPECIAL, in_bytes, letters, [_SPACE, 2 * _SPACE], [_SPACE + word for word in WORDS]),
            [(_SPACE, _SPACE)], unk_token="<unk>", byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's: one token per byte here, and an added token with a space in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(_numbered(SPECIAL, alphabet), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = _fast(tokenizer)
    made.add_tokens(["two words", "<think>"])
    return made


def words() -> PreTrainedTokenizerFast:
    """Whole words and no decoder at all: tokens are joined by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(_numbered(SPECIAL, WORDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(tokenizer)


def repeats_dropped() -> PreTrainedTokenizerFast:
    """A decoder that no single token's text can follow: what is repeated is dropped."""
    from tokenizers import decoders

    made = words()
    made.backend_tokenizer.decoder = decoders.CTC(pad_token="<pad>", word_delimiter_token="|")
    return made


def panics() -> PreTrainedTokenizerFast:
    """A decoder that takes the last space from a text, at which the library panics where there is none."""
    from tokenizers import decoders

    made = words()
    made.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    return made


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "word ends": word_ends,
    "unigram": unigram,
    "unigram, no mark in front": lambda: unigram("never"),
    "byte fallback": byte_fallback,
    "byte level": byte_level,
    "words": words,
}
