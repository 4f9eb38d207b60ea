"""Tokens back to text: what each token adds to those before it, as the tokenizer itself decodes them.

It knows tokenizers of `transformers`, and neither requests nor models.

A byte-level token is the same bytes wherever it stands. What any other token adds depends on its place:
SentencePiece drops the space of the first word, WordPiece puts one between words and none before ``##ing``, a
word that ends in ``</w>`` is followed by one. None of this is imitated here. The tokenizer is asked for two
tokens and for the first of them alone, and the difference is what the second adds; pairs whose first tokens
are followed alike share the answer. `Detokenizer.difference` compares that with whole sequences.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_SAMPLES = (
    "Hello, world! It's 12:30; they do not stop.",
    "naïve café, “quoted”: 你好, мир 😀",
    "  two  spaces\n\ta tab, a ' b 's.\n\n",
)
_SEQUENCES, _LENGTH = 48, 8
"""Random sequences of ids on which single tokens and whole sequences are compared."""


class ByteToken(bytes):
    """A token of byte fallback (``<0xE2>``): of a run that is not UTF-8 each is a replacement character."""


class LeftOut(bytes):
    """The name of a special token that is generated and not shown: it is no part of the text."""


def text_of(pieces: Sequence[bytes]) -> str:
    """The text of consecutive tokens' pieces, as the tokenizer decodes it."""
    parts = []
    shown = (p for p in pieces if not isinstance(p, LeftOut) and (p or isinstance(p, ByteToken)))
    for single, group in groupby(shown, lambda piece: isinstance(piece, ByteToken)):
        run = list(group)
        data = b"".join(run)
        try:
            parts.append(data.decode())
        except UnicodeDecodeError:
            parts.append("\ufffd" * len(run) if single else data.decode(errors="replace"))
    return "".join(parts)


class Detokenizer:
    """Decodes token by token for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = _is_byte_level(tokenizer)
        self._followed: dict[int, str] = {}
        self._pieces: dict[tuple[str | None, int], bytes] = {}

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that the tokenizer itself leaves out where special tokens are not to be shown."""
        added = {*map(int, self._tokenizer.added_tokens_decoder), *map(int, self._tokenizer.all_special_ids)}
        return frozenset(i for i in added if self._decode([i]) and not self._decode([i], skip_special=True))

    @cached_property
    def middle(self) -> int:
        """An ordinary token, after which others stand in the middle of a text."""
        return int((self._tokenizer.encode("a", add_special_tokens=False) or [0])[-1])

    def piece(self, token: int, before: int | None) -> bytes:
        """The bytes that a token adds to a text; they need not be valid UTF-8 on their own.

        Args:
            before: the token in front of it, None at the beginning of a text.
        """
        key = None if before is None or self._is_byte_level else self._what_follows(before), token
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self._find(token, before)
        return found

    def backwards(
        self, tokens: Sequence[int], context: Sequence[int] = (), skip_special: bool = False
    ) -> Iterator[bytes]:
        """The pieces of consecutive tokens, the last one first.

        Args:
            context: tokens in front of them, whose text is not wanted; without any they begin a text.
            skip_special: whether special tokens are `LeftOut`.
        """
        for place in range(len(tokens) - 1, -1, -1):
            token = tokens[place]
            if skip_special and token in self.special:
                yield LeftOut(self._decode([token]).encode())
            else:
                yield self.piece(token, self._before(tokens, place, context, skip_special))

    def difference(self) -> str:
        """The first sample that is not decoded token by token as it is in whole; empty if there is none."""
        tokenizer, draw = self._tokenizer, random.Random(0)
        samples = [
            list(tokenizer.encode(text, add_special_tokens=special))
            for text in _SAMPLES
            for special in (False, True)
        ]
        size = len(tokenizer)
        samples += [[draw.randrange(size) for _ in range(_LENGTH)] for _ in range(_SEQUENCES)]
        for ids in samples:
            for skip in (False, True):
                whole = self._decode(ids, skip, clean_up=self._cleans_up)
                single = text_of([*self.backwards(ids, skip_special=skip)][::-1])
                if single != whole:
                    shown = ids if len(ids) <= _LENGTH else [*ids[:_LENGTH], "..."]
                    return f"token ids {shown} are {whole!a}, one by one {single!a}"
        return ""

    @property
    def _cleans_up(self) -> bool:
        """Whether the tokenizer changes spaces of a decoded text, which `transformers` never does for BPE."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        if type(getattr(backend, "model", None)).__name__ == "BPE" and not getattr(
            self._tokenizer, forced, False
        ):
            return False
        return bool(self._tokenizer.clean_up_tokenization_spaces)

    def _decode(self, ids: Sequence[int], skip_special: bool = False, clean_up: bool = False) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=clean_up
            )
        )

    def _before(
        self, tokens: Sequence[int], place: int, context: Sequence[int], skip_special: bool
    ) -> int | None:
        """The token in front of one; ids that no text has are passed over, as the tokenizer does."""
        if self._is_byte_level:
            return None
        for part, end in ((tokens, place), (context, len(context))):
            for index in range(end - 1, -1, -1):
                token = part[index]
                left_out = skip_special and token in self.special
                if not left_out and self._tokenizer.convert_ids_to_tokens(token) is not None:
                    return token
        return None

    def _what_follows(self, token: int) -> str:
        """What an ordinary token adds after this one: tells apart after which tokens a space is added."""
        found = self._followed.get(token)
        if found is None:
            found = self._followed[token] = self._added(self.middle, token)
        return found

    def _added(self, token: int, before: int | None) -> str:
        if before is None:
            return self._decode([token])
        first, both = self._decode([before]), self._decode([before, token])
        return both[len(first) :] if both.startswith(first) else self._decode([token])

    def _find(self, token: int, before: int | None) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # ids of the model's padded vocabulary that the tokenizer does not use
            return b""
        if isinstance(name, bytes):
            return name
        if self._is_byte_level:  # a token with any other character is plain text
            known = all(c in _BYTE_OF_CHARACTER for c in name)
            return bytes(_BYTE_OF_CHARACTER[c] for c in name) if known else name.encode()
        byte = _BYTE_PIECE.fullmatch(name)
        if byte and (alone := self._decode([token])) != name:
            is_dropped = before is None and not alone  # the space that SentencePiece drops
            return ByteToken() if is_dropped else ByteToken([int(byte[1], 16)])
        return self._added(token, before).encode(errors="replace")


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHARACTER = {
    **{chr(byte): byte for byte in _PRINTABLE},
    **{chr(256 + place): byte for place, byte in enumerate(_OTHERS)},
}
"""The alphabet of byte-level BPE: printable Latin-1 characters stand for their own code, the other bytes for
the code points from 256 on, in order."""


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a fast tokenizer's decoder has a byte-level step, or one written in Python that alphabet."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    return '"type": "ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
